"""The bounds that rules judge by, in one place: stages judge with them, and reports draw them."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """Between which figures a rule lets documents stay.

    Attributes:
        rule: its name.
        least, most: bounds, both included; None is no bound, and with neither the rule only tells its figure.
        of: which documents it is for, in words, where others have another; '' is all that nothing else is said of.
    """

    rule: str
    least: float | None = None
    most: float | None = None
    of: str = ''

    def keeps(self, value: float | None) -> bool:
        """Whether a value is within the bounds; None, which stands for no figure, is."""
        if value is None:
            return True
        return not ((self.least is not None and value < self.least) or (self.most is not None and value > self.most))

    def keep(self, values: np.ndarray) -> np.ndarray:
        """Whether each value is within the bounds; NaN, which stands for no figure, is."""
        keep = np.ones(len(values), np.bool_)
        if self.least is not None:
            keep &= ~(values < self.least)
        if self.most is not None:
            keep &= ~(values > self.most)
        return keep
