"""Multiple choice by likelihood: which of the choices does a model find likeliest after a context?

    items = MultipleChoiceSet('arc_easy', 'arc_easy.jsonl.gz').items()
    rows = choice_rows(items, vocabulary, max_length=256)
    scores = ChoiceScorer(model_config, mesh)(parameters, rows)      # log-likelihoods of all choices
    figures = item_figures(items, scores)                            # [items] each; their means are the metrics

As lm-evaluation-harness (Gao et al. 2021) does it: a choice's score is the summed log-likelihood of its tokens after
the context's, in nats. `accuracy` (its acc) takes the largest score, `normalized_accuracy` (its acc_norm) the largest
score per character of the choice; of equals the first. Small models are at chance in both. What tells them apart sooner
is continuous: the score of the right choice per byte, and its margin over the mean of the wrong ones (as the proxies of
DataDecide, Magnusson et al. 2025). Over the best wrong one, the margin of a model at chance would be below 0, and more
so the further its scores lie apart, which says nothing of what it knows.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm.data.sources.files import find_files, split_stream, stream_bytes
from llm.data.token_cache import Boundaries
from llm.data.vocabularies import Vocabulary
from llm.errors import UserError
from llm.evaluation.published_layouts import as_query
from llm.models.decoder import DecoderConfig
from llm.parallel.sharding import AxisRules, names, use_rules
from llm.training.layout import placed, token_order
from llm.training.losses import token_negative_log_likelihood

FIGURES = ('accuracy', 'normalized_accuracy', 'log_likelihood_per_byte', 'margin_per_byte')

SUFFIXES = tuple(f'{kind}{packing}' for kind in ('.jsonl', '.json') for packing in ('', '.gz', '.zst', '.bz2'))
_SHORTEST = 32  # tokens of a row


@dataclasses.dataclass(frozen=True)
class Item:
    """A context with choices.

    Attributes:
        context: with what stands between it and a choice. choices: at least two, none empty.
        answer: index of the right one. where: file:line.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    where: str


@dataclasses.dataclass(frozen=True)
class MultipleChoiceSet:
    """Items of JSON lines, in the form of MosaicML's llm-foundry: an object of context, choices, index of the answer.

    Args:
        name: for metrics and reports.
        files: glob or globs.
        context_field, choices_field, answer_field: names of the fields; with the default names, records as ARC,
            CommonsenseQA, OpenBookQA and HellaSwag are published are read, too.
        delimiter: what stands between context and choice; white space around both goes. '\\nAnswer: ' is
            llm-foundry's for ARC, PIQA, OpenBookQA and CommonsenseQA; ' ' that of HellaSwag.
        first_answer: the index of the first choice, 0 or 1.
        limit: take so many items, the first ones; None takes all.
    """

    name: str
    files: str | tuple[str, ...]
    context_field: str = 'query'
    choices_field: str = 'choices'
    answer_field: str = 'gold'
    delimiter: str = '\nAnswer: '
    first_answer: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.first_answer not in (0, 1):
            raise UserError(f'first_answer is {self.first_answer}', where=self.name, fix='Use 0 or 1.')
        if self.limit is not None and self.limit < 1:
            raise UserError(f'limit is {self.limit}', where=self.name, fix='Use at least 1, or None.')

    def items(self) -> list[Item]:
        """The items.

        Raises:
            UserError: a file cannot be read, there is no item, or a line is no item; names file and line.
        """
        found = []
        for path in find_files(self.files, SUFFIXES):
            for number, line in enumerate(split_stream(stream_bytes(path), b'\n'), start=1):
                if line.strip():
                    found.append(self._item(line, f'{path}:{number}'))
                if len(found) == self.limit:
                    return found
        if not found:
            raise UserError('a set of multiple choice has no items', where=str(self.files), fix='Check the file.')
        return found

    def _item(self, line: bytes, where: str) -> Item:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f'this is not JSON ({error})', where=where, fix='Write one object a line.') from None
        fields = (self.context_field, self.choices_field, self.answer_field)
        if (
            fields == ('query', 'choices', 'gold')
            and self.first_answer == 0
            and not (isinstance(record, dict) and 'query' in record)
        ):
            record = as_query(record)
        missing = [field for field in fields if not isinstance(record, dict) or field not in record]
        if missing:
            has = ', '.join(map(repr, record)) if isinstance(record, dict) else f'a JSON {type(record).__name__}'
            raise UserError(
                f'there is no field {missing[0]!r}, but {has or "none"}',
                where=where,
                fix='Set context_field, choices_field and answer_field of MultipleChoiceSet.',
            )
        context, choices, answer = (record[field] for field in fields)
        if not _is_text(context):
            raise UserError(
                f'{self.context_field!r} is {_shown(context)}, not a text', where=where, fix='Mend the item.'
            )
        if not isinstance(choices, list) or not all(map(_is_text, choices)):
            raise UserError(
                f'{self.choices_field!r} is {_shown(choices)}, not a list of texts', where=where, fix='Mend the item.'
            )
        if len(choices) < 2:
            raise UserError(f'there is {len(choices)} choice', where=where, fix='Give two or more, or leave it out.')
        if isinstance(answer, bool) or not isinstance(answer, int):
            raise UserError(
                f'{self.answer_field!r} is {_shown(answer)}, not the index of a choice',
                where=where,
                fix='Mend the item.',
            )
        if not 0 <= answer - self.first_answer < len(choices):
            last = len(choices) - 1 + self.first_answer
            raise UserError(
                f'{self.answer_field!r} is {answer}, and the choices are {self.first_answer} to {last}',
                where=where,
                fix='Mend the item, or set MultipleChoiceSet.first_answer.',
            )
        stripped = tuple(choice.strip() for choice in choices)
        return Item(context.strip() + self.delimiter, stripped, answer - self.first_answer, where)


def _is_text(value: Any) -> bool:
    """Whether it is a string with something in it that UTF-8 can encode."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not any('\ud800' <= character <= '\udfff' for character in value)


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]


@dataclasses.dataclass(frozen=True)
class ChoiceRow:
    """One choice after its context, as tokens.

    Attributes:
        tokens: what the model reads and the last target. choice: how many of them, at the end, are the choice's.
        cut: whether the beginning of the context did not fit.
    """

    tokens: tuple[int, ...]
    choice: int
    cut: bool


def choice_rows(items: Sequence[Item], vocabulary: Vocabulary, max_length: int) -> list[list[ChoiceRow]]:
    """The rows of the choices of each item.

    Context and choice are encoded together, and the choice has the tokens from the number of those of the context alone
    on, as in lm-evaluation-harness; white space at the end of the context counts as the choice's, since most
    vocabularies have it at the beginning of words. Before all is the token that begins a document. Where a row has more
    than `max_length` tokens to read, the first ones go.

    Raises:
        UserError: a choice alone is longer.
    """
    start = Boundaries.of(vocabulary).start
    contexts = [item.context.rstrip() for item in items]
    heads = vocabulary.encode_batch(contexts)
    whole = vocabulary.encode_batch([item.context + choice for item in items for choice in item.choices])
    encoded = iter(whole)
    rows = []
    for item, head in zip(items, heads, strict=True):
        row = []
        for _ in item.choices:
            own = next(encoded)[len(head) :]
            tokens, choice = (start, *head.tolist(), *own.tolist()), len(own)
            if choice > max_length:
                raise UserError(
                    f'a choice has {choice} tokens, and rows have {max_length}',
                    where=item.where,
                    fix='Allow longer rows, or leave the item out.',
                )
            if choice < 1:
                raise UserError(
                    'a choice has no token of its own: this vocabulary joins it to its context',
                    where=item.where,
                    fix='Use a delimiter that ends in white space.',
                )
            row.append(ChoiceRow(tokens[-(max_length + 1) :], choice, len(tokens) > max_length + 1))
        rows.append(row)
    return rows


class ChoiceScorer:
    """The compiled programs that score rows with one model; their lengths are rounded up to powers of two.

    Args:
        model: a decoder. mesh, rules: where the parameters live.
        tokens: about how many a batch has.
    """

    def __init__(self, model: DecoderConfig, mesh: Mesh, rules: AxisRules = AxisRules(), tokens: int = 16_384) -> None:
        self._config, self._mesh, self._rules, self._tokens = model, mesh, rules, tokens
        self._graph: nnx.GraphDef = nnx.split(model.build())[0]
        self._run = jax.jit(self._log_likelihoods, out_shardings=NamedSharding(mesh, PartitionSpec()))
        axes = names(rules.partition(('batch',), mesh, parameters=False)[0])
        self._ways = math.prod(mesh.shape[axis] for axis in axes)

    def __call__(self, parameters: Any, rows: Sequence[Sequence[ChoiceRow]]) -> list[np.ndarray]:
        """Log-likelihood in nats of each choice: float64 [choices] for each item.

        Args:
            parameters: nested dict of arrays.
        """
        flat = [row for item in rows for row in item]
        found = np.zeros(len(flat))
        for width, members in self._batches(flat):
            # A batch is as large as its width allows, the last of a width too: one program for each.
            most, needed = max(1, self._tokens // width // self._ways), -(-len(members) // self._ways)
            size = self._ways * min(most, 1 << (needed - 1).bit_length())
            for begin in range(0, len(members), size):
                batch = members[begin : begin + size]
                arrays = _padded([flat[i] for i in batch], size, width)
                found[batch] = np.asarray(self._run(parameters, *arrays), np.float64)[: len(batch)]
        return np.split(found, np.cumsum([len(item) for item in rows])[:-1])

    def _batches(self, rows: Sequence[ChoiceRow]) -> Iterator[tuple[int, list[int]]]:
        """(width, rows of it) from the shortest."""
        widths: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            width = 1 << (max(_SHORTEST, len(row.tokens) - 1) - 1).bit_length()
            if self._config.longest is not None:
                width = min(width, self._config.longest)
            widths.setdefault(width, []).append(index)
        yield from sorted(widths.items())

    def _log_likelihoods(
        self, parameters: Any, inputs: jax.Array, targets: jax.Array, weights: jax.Array, real: jax.Array
    ) -> jax.Array:
        with use_rules(self._mesh, self._rules):
            batch = placed({'inputs': inputs, 'targets': targets, 'weights': weights, 'segment_ids': real})
            model = nnx.merge(self._graph, parameters)
            hidden = model.hidden(
                batch['inputs'], segment_ids=batch['segment_ids'], token_index=token_order(inputs.shape[1])
            )
            nll, _ = token_negative_log_likelihood(model.projection(), hidden, batch['targets'])
            return -jnp.sum(jnp.where(batch['weights'] > 0, nll, 0.0), axis=1)


def _padded(rows: Sequence[ChoiceRow], size: int, width: int) -> tuple[np.ndarray, ...]:
    """(inputs, targets, weights, whether real), int32 [size, width] each."""
    inputs, targets, weights, real = np.zeros((4, size, width), np.int32)
    for i, row in enumerate(rows):
        length = len(row.tokens) - 1
        inputs[i, :length], targets[i, :length], real[i, :length] = row.tokens[:-1], row.tokens[1:], 1
        weights[i, length - row.choice : length] = 1
    return inputs, targets, weights, real


def item_figures(items: Sequence[Item], log_likelihoods: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """What each item is worth, float64 [items] by the names in FIGURES; larger is better.

    accuracy: 1 if the right choice has the largest log-likelihood. normalized_accuracy: the same of log-likelihoods
    per character. log_likelihood_per_byte: of the right choice, nats. margin_per_byte: this less the mean of the wrong
    ones.
    """
    found: dict[str, list[float]] = {name: [] for name in FIGURES}
    for item, scores in zip(items, log_likelihoods, strict=True):
        by_character = scores / np.array([len(choice) for choice in item.choices])
        by_byte = scores / np.array([len(choice.encode()) for choice in item.choices])
        right, wrong = by_byte[item.answer], np.delete(by_byte, item.answer)
        values = (
            float(np.argmax(scores) == item.answer),
            float(np.argmax(by_character) == item.answer),
            right,
            right - wrong.mean(),
        )
        for name, value in zip(FIGURES, values, strict=True):
            found[name].append(value)
    return {name: np.array(values, np.float64) for name, values in found.items()}
