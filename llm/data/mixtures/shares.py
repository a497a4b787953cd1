"""How much of each component a mixture has, and how often that reads it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from llm.data.curricula import Curriculum, FloatArray, with_limits
from llm.data.index_maps import temperature_rates
from llm.errors import UserError

# Muennighoff et al. 2023, section 5: up to four epochs are nearly as good as new text.
_GOOD_EPOCHS = 4
_STEPS = 1000  # in which a run is divided to see when components end


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a mixture amounts to, by component in order.

    Attributes:
        shares: of all rows, if no component ends; mean over training under a curriculum.
        sizes: tokens (or bytes) read of each. epochs: how often that reads it.
        total: tokens (or bytes) of the run; what the budget was or came to.
        warnings: in words.
    """

    shares: list[float]
    sizes: list[float]
    epochs: list[float]
    total: float
    warnings: list[str]


def outcome(
    components: Sequence[dict[str, Any]],
    unit: Literal['tokens', 'bytes'],
    *,
    temperature: float,
    curriculum: Curriculum | None,
    budget: int | None,
    budget_unit: Literal['tokens', 'bytes', 'documents'],
) -> Outcome:
    """Work out shares and epochs of counted components (`Part.record` with counts for 'train').

    Without a budget the run reads all components once, or as often as their `epochs` say.

    Raises:
        UserError: a curriculum gives a component nothing, or somewhere only components that have ended have a rate.
    """
    names = [each['name'] for each in components]
    sizes = np.asarray([each['train'][unit] for each in components], np.float64)
    documents = np.asarray([each['train']['documents'] for each in components], np.float64)
    natural = sizes * [max(1.0, each['epochs_wanted']) for each in components]
    if curriculum is not None:
        wanted = curriculum.integrals(names, curriculum.steps or _STEPS)
    else:
        weights = [each['weight'] for each in components]
        rates = weights if weights[0] is not None else list(temperature_rates(natural, temperature=temperature))
        wanted = np.arange(_STEPS + 1.0)[:, None] * (np.asarray(rates, np.float64) / sum(rates))
    shares = wanted[-1] / wanted[-1].sum()
    for name, share in zip(names, shares.tolist(), strict=True):
        if share <= 0:
            raise UserError('its rates come to 0 over the run', where=name, fix='Leave the component out.')
    total = float(natural.sum()) if budget is None else float(budget)
    if budget is not None and budget_unit == 'documents':
        total = budget / float((shares * documents / sizes).sum())
    limits = [
        None if each['max_epochs'] is None else each['max_epochs'] * size
        for each, size in zip(components, sizes.tolist(), strict=True)
    ]
    read: FloatArray = wanted * (total / wanted[-1].sum())
    if any(limit is not None for limit in limits):
        read = with_limits(read, limits, names)
    epochs = read[-1] / sizes
    warnings = []
    for name, count, limit, got in zip(names, epochs.tolist(), limits, read.T, strict=True):
        if count > _GOOD_EPOCHS:
            warnings.append(f'{name} would be read {count:.1f} times')
        if limit is not None and got[-1] >= limit and (end := int(np.searchsorted(got, limit))) < len(got) - 1:
            warnings.append(f'{name} has had its max_epochs after {end / (len(got) - 1):.0%} of the run')
    if read[-1].sum() < total * (1 - 1e-9):
        warnings.append(f'every component has had its max_epochs after {read[-1].sum() / total:.0%} of the budget')
    warnings += [
        f'{each["name"]} has no documents of the validation split, and is not evaluated'
        for each in components
        if not each['validation']['documents']
    ]
    return Outcome(shares.tolist(), read[-1].tolist(), epochs.tolist(), total, warnings)


def table(record: dict[str, Any]) -> str:
    """The components of a mixture for the terminal."""
    unit = record['size_unit']
    lines = [f'{"component":24}{"documents":>12}{unit:>18}{"held out":>12}{"share":>9}{"epochs":>9}']
    for each in record['components']:
        train = each['train']
        lines.append(
            f'{each["name"]:24}{train["documents"]:>12,}{train[unit]:>18,}{each["validation"]["documents"]:>12,}'
            f'{each["share"]:>9.4f}{each["epochs"]:>9.3g}'
        )
    lines.append(f'a run of {record["total"]:,.0f} {unit}')
    if record['curriculum'] is not None:
        found = record['curriculum']
        points = ', '.join(f'{point:g}' for point in found['at'])
        lines.append(f'rates at {points} ({"steps" if found["steps"] else "of the run"}, {found["shape"]}):')
        for name, rates in found['rates'].items():
            lines.append(f'  {name:22}' + ''.join(f'{rate:>9.4g}' for rate in rates))
    return '\n'.join([*lines, *(f'warning: {warning}' for warning in record['warnings'])])
