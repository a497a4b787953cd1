"""What an ablation of data shows: figures of runs by variant and seed, compared in pairs, and a verdict."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm.evaluation.comparison import (
    Estimate,
    Overall,
    Verdict,
    bootstrap_interval,
    crossed_over_seeds_and_items,
    holm,
    overall,
    paired_over_seeds,
    verdict,
)

BITS_PER_BYTE = 'bits_per_byte'
ASSUMPTIONS = (
    'Each variant was trained once for each seed, and runs of one seed began with the same parameters: what is tested '
    'is the difference within a seed, of the last evaluation.',
    "Bits per byte: Student's t test of the differences over seeds, two-sided. It takes seeds to be independent and "
    'their differences to be about normal, which a handful of seeds cannot show, and the held-out texts to be fixed.',
    'Multiple choice: t test of the mean difference over seeds and items, both of them random and crossed; variance by '
    'the mean squares of the two-way analysis of variance, degrees of freedom by Satterthwaite, at most seeds - 1.',
    'Where all differences are the same, the p-value is that of the sign test, and the interval has no width.',
    'The training text of a variant is fixed: another sample of the same pages could give another answer, and so could '
    'a larger model or more tokens.',
    "P-values are corrected for the number of metrics and comparisons by Holm's method; intervals are not.",
)


@dataclasses.dataclass(frozen=True)
class Scores:
    """What one run ended with.

    Attributes:
        bits_per_byte: by held-out set. choices: by set of multiple choice, then by figure, float64 [items].
    """

    bits_per_byte: Mapping[str, float]
    choices: Mapping[str, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Compared:
    """One metric of one variant against the baseline.

    Attributes:
        variant, dataset, metric: what is compared. larger_is_better: of the metric.
        baseline, value: means over seeds, and items.
        estimate: of the difference, value less baseline. bootstrap: interval of it, of multiple choice alone.
        corrected_p_value: by Holm, over all that were compared. verdict: at the level.
    """

    variant: str
    dataset: str
    metric: str
    larger_is_better: bool
    baseline: float
    value: float
    estimate: Estimate
    bootstrap: tuple[float, float] | None
    corrected_p_value: float
    verdict: Verdict

    def record(self) -> dict[str, Any]:
        """For JSON."""
        fields = dataclasses.asdict(self)
        return fields | fields.pop('estimate')


def compare(scores: Mapping[str, Sequence[Scores]], *, confidence: float = 0.95, level: float = 0.05) -> list[Compared]:
    """Every metric of every variant against the first one.

    Args:
        scores: by variant, those of the same seeds in the same order, at least two.
    """
    baseline, *others = scores
    rows: list[tuple[str, str, str, np.ndarray, np.ndarray]] = []
    for variant in others:
        first, second = scores[baseline], scores[variant]
        for name in first[0].bits_per_byte:
            before, after = (np.array([run.bits_per_byte[name] for run in runs]) for runs in (first, second))
            rows.append((variant, name, BITS_PER_BYTE, before, after))
        for name, figures in first[0].choices.items():
            for metric in figures:
                before, after = (np.stack([run.choices[name][metric] for run in runs]) for runs in (first, second))
                rows.append((variant, name, metric, before, after))
    estimates, bootstraps = [], []
    for _, _, _, before, after in rows:
        differences = after - before
        items = differences.ndim > 1 and differences.shape[1] > 1
        estimates.append(
            crossed_over_seeds_and_items(differences, confidence)
            if items
            else paired_over_seeds(differences.reshape(len(differences)), confidence)
        )
        bootstraps.append(bootstrap_interval(differences, confidence) if items else None)
    corrected = holm([estimate.p_value for estimate in estimates])
    return [
        Compared(
            variant,
            name,
            metric,
            metric != BITS_PER_BYTE,
            float(before.mean()),
            float(after.mean()),
            estimate,
            bootstrap,
            p_value,
            verdict(estimate.difference, p_value, larger_is_better=metric != BITS_PER_BYTE, level=level),
        )
        for (variant, name, metric, before, after), estimate, bootstrap, p_value in zip(
            rows, estimates, bootstraps, corrected, strict=True
        )
    ]


def verdicts(compared: Sequence[Compared]) -> dict[str, Overall]:
    """The overall verdict on each variant."""
    names = dict.fromkeys(each.variant for each in compared)
    return {name: overall([each.verdict for each in compared if each.variant == name]) for name in names}


def sentence(compared: Sequence[Compared], variant: str, baseline: str, seeds: int, level: float) -> str:
    """The verdict on a variant in words."""
    own = [each for each in compared if each.variant == variant]
    shown = {
        side: [f'{each.dataset} {each.metric.replace("_", " ")}' for each in own if each.verdict == side]
        for side in ('better', 'worse')
    }
    test = f'{seeds} seeds in pairs, {len(compared)} tests corrected by Holm, level {level:g}'
    if not any(shown.values()):
        return f'No difference between {variant} and {baseline} is shown ({test}).'
    what = {'better': 'is better than', 'worse': 'is worse than', 'mixed': 'is better in some and worse in others than'}
    parts = [f'{side} on {", ".join(names)}' for side, names in shown.items() if names]
    rest = len(own) - sum(map(len, shown.values()))
    if rest:
        parts.append(f'no difference shown on {rest} of {len(own)} metrics')
    total = verdicts(own)[variant]
    return f'{variant} {what[total]} {baseline}: {"; ".join(parts)} ({test}).'
