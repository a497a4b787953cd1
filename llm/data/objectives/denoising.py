"""Denoising for an encoder-decoder: spans are cut out of a text and told again. T5's span corruption, UL2's mixture.

Of "Thank you for inviting me to your party last week" with noise on "for inviting" and "last" the encoder reads
"Thank you <X> me to your party <Y> week" and the decoder writes "<X> for inviting <Y> last" (Raffel et al. 2020, figure
2). Both end with the end of a document. Sentinels are the vocabulary's '<extra_id_0>', ... where it has them, and else
ids after it, counted down as T5 does.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from llm.data.objectives import BatchKind, Example, IndexArray, PostCache, spans_of
from llm.data.token_cache import Boundaries, Tokenizer
from llm.errors import UserError

Tokens = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """How much of a text is noise, and in what pieces.

    Attributes:
        density: share of the tokens that are noise.
        mean_span: mean length of a span of noise; None is one span at the end, of `density` of the text: UL2's S.
        mode: number of the mode token that begins the encoder's inputs (Tay et al. 2023, section 3.2); None for none.
        rate: how often it is taken, relative to the others of a mixture.
    """

    density: float = 0.15
    mean_span: float | None = 3.0
    mode: int | None = None
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.density < 1 or self.rate <= 0 or (self.mean_span is not None and self.mean_span < 1):
            raise UserError(
                f'{self} is out of range',
                where='Denoiser',
                fix='Use a density between 0 and 1, spans of at least 1 token and a positive rate.',
            )
        if self.mode is not None and self.mode < 0:
            raise UserError(f'mode is {self.mode}', where='Denoiser', fix='Use 0, 1, 2, ... or None.')

    def counts(self, lengths: IndexArray) -> tuple[IndexArray, IndexArray]:
        """How many tokens are noise, and in how many spans, in texts of these lengths: as T5's code has it."""
        lengths = np.maximum(lengths, 2)
        noise = np.clip(np.round(lengths * self.density).astype(np.int64), 1, lengths - 1)
        if self.mean_span is None:
            return noise, np.ones_like(noise)
        return noise, np.clip(np.round(noise / self.mean_span).astype(np.int64), 1, np.minimum(noise, lengths - noise))

    def noise(self, length: int, generator: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Which tokens are noise, [length]: spans of text and of noise in turn, their lengths drawn evenly.

        The distribution is that of `random_spans_noise_mask` of T5: all ways to cut the noise into its spans, and the
        text into as many, are equally likely, and text comes first.
        """
        noise, spans = (int(x[0]) for x in self.counts(np.array([length])))
        whole = max(length, 2)
        lengths = np.stack(
            [_random_lengths(whole - noise, spans, generator), _random_lengths(noise, spans, generator)], axis=1
        ).reshape(-1)
        return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)[:length]

    def sides(self, lengths: IndexArray) -> tuple[IndexArray, IndexArray]:
        """The most that the encoder and the decoder get of texts of these lengths, or shorter ones."""
        noise, spans = self.counts(lengths)
        mode = 0 if self.mode is None else 1
        return lengths - np.minimum(noise, lengths) + spans + 1 + mode, noise + spans + 1


def _random_lengths(items: int, parts: int, generator: np.random.Generator) -> IndexArray:
    """`items` cut into `parts` of at least one each; every way is as likely as any other."""
    cuts = np.sort(generator.permutation(items - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [items]]))


# Tay et al. 2023, "UL2", table 1; mode tokens R, S, X.
_R, _S, _X = 0, 1, 2
UL2_DENOISERS = (
    Denoiser(0.15, 3.0, _R),
    Denoiser(0.15, 8.0, _R),
    Denoiser(0.25, None, _S, 2.0),
    Denoiser(0.5, 3.0, _X),
    Denoiser(0.5, 8.0, _X),
    Denoiser(0.15, 64.0, _X),
    Denoiser(0.5, 64.0, _X),
)


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """T5's objective (Raffel et al. 2020, section 3.1.4), or with `denoisers` a mixture such as UL2's.

    Documents of a row are corrupted one by one, or the row as a whole where attention runs across documents, as in T5.

    Attributes:
        denoisers: one is drawn for each document; UL2_DENOISERS for those of UL2.
        target_length: tokens of a row of the decoder; None for as many as the longest text of the encoder can need.
        num_sentinels: how many spans there can be at most.
    """

    denoisers: tuple[Denoiser, ...] = (Denoiser(),)
    target_length: int | None = None
    num_sentinels: int = 100

    def __post_init__(self) -> None:
        if not self.denoisers:
            raise UserError('denoisers is empty', where='SpanCorruption', fix='Give at least one.')
        if self.num_sentinels < 1 or (self.target_length is not None and self.target_length < 4):
            raise UserError(
                f'target_length is {self.target_length}, num_sentinels {self.num_sentinels}', where='SpanCorruption'
            )

    @property
    def modes(self) -> int:
        """How many mode tokens there are."""
        return max((0 if each.mode is None else each.mode + 1) for each in self.denoisers)

    def batch_kind(self) -> BatchKind:
        """Of the models that it is for."""
        return 'encoder_decoder'

    def extra_ids(self, vocabulary: Tokenizer) -> int:
        """Mode tokens, and sentinels if the vocabulary has none; see the module's docstring."""
        return self.modes + (0 if _own_sentinels(vocabulary, self.num_sentinels) is not None else self.num_sentinels)

    def window(self, sequence_length: int) -> int:
        """The longest text that both sides hold, whichever denoiser is drawn.

        Raises:
            UserError: rows are too short, or it has more spans than there are sentinels.
        """
        lengths = np.arange(1, 4 * sequence_length)
        encoder, decoder = self._sides(lengths)
        fits = encoder <= sequence_length
        if self.target_length is not None:
            fits &= decoder <= self.target_length
        if not fits[0]:
            raise UserError(
                f'rows of {sequence_length} tokens, and of {self.target_length} targets, hold no text',
                where='StepConfig.sequence_length',
                fix='Use longer rows.',
            )
        longest = int(lengths[np.argmin(fits) - 1])
        spans = max(int(each.counts(np.array([longest]))[1][0]) for each in self.denoisers)
        if spans > self.num_sentinels:
            raise UserError(
                f'texts of {longest} tokens have {spans} spans of noise, and there are {self.num_sentinels} sentinels',
                where='SpanCorruption.num_sentinels',
                fix=f'Use at least {spans}.',
            )
        return longest

    def room(self, lengths: IndexArray, sequence_length: int) -> IndexArray:
        """What texts take of the encoder's row or, if that is more, in proportion of the decoder's."""
        encoder, decoder = self._sides(lengths)
        return np.maximum(encoder, -(-decoder * sequence_length // self.decoder_length(sequence_length)))

    def decoder_length(self, sequence_length: int) -> int:
        """Tokens of a row of the decoder."""
        if self.target_length is not None:
            return self.target_length
        return int(self._sides(np.array([self.window(sequence_length)]))[1][0])

    def bind(self, vocabulary: Tokenizer, sequence_length: int) -> PostCache:
        """The function on rows."""
        own, first = _own_sentinels(vocabulary, self.num_sentinels), vocabulary.size
        if own is None:
            own, first = np.arange(first + self.num_sentinels - 1, first - 1, -1), first + self.num_sentinels
        return _Denoising(
            self,
            vocabulary.digest,
            (sequence_length, self.decoder_length(sequence_length)),
            Boundaries.of(vocabulary),
            own.astype(np.int32),
            first,
        )

    def _sides(self, lengths: IndexArray) -> tuple[IndexArray, IndexArray]:
        sides = [each.sides(lengths) for each in self.denoisers]
        return np.max([encoder for encoder, _ in sides], axis=0), np.max([decoder for _, decoder in sides], axis=0)


def _own_sentinels(vocabulary: Tokenizer, count: int) -> IndexArray | None:
    """The ids of '<extra_id_0>', ..., if the vocabulary has as many."""
    special = getattr(vocabulary, 'special_ids', {})
    names = [f'<extra_id_{i}>' for i in range(count)]
    return np.array([special[name] for name in names]) if all(name in special for name in names) else None


def corrupt(tokens: Tokens, noise: npt.NDArray[np.bool_], sentinels: Tokens) -> tuple[Tokens, Tokens]:
    """Text with a sentinel for each span of noise, and the noise with a sentinel before each span.

    Args:
        tokens: [n]; noise: [n], whether a token is noise. sentinels: one for each span, in order.
    """
    starts = np.flatnonzero(noise & ~np.concatenate([[False], noise[:-1]]))
    marked = tokens.copy()
    marked[starts] = sentinels[: len(starts)]
    kept = ~noise
    kept[starts] = True
    told = np.insert(tokens, starts, sentinels[: len(starts)])
    return marked[kept], told[np.insert(noise, starts, True)]


@dataclasses.dataclass(frozen=True)
class _Denoising:
    """The function."""

    config: SpanCorruption
    vocabulary: str
    lengths: tuple[int, int]
    boundaries: Boundaries
    sentinels: Tokens = dataclasses.field(repr=False)
    first_mode: int = 0

    def __call__(self, example: Example, generator: np.random.Generator) -> Example:
        """A row of packed documents, whose targets are the tokens, to rows of the encoder and of the decoder."""
        pad = self.boundaries.pad
        rows = {name: np.full(self.lengths[name != 'encoder'], pad, np.int32) for name in ('encoder', 'decoder')}
        segments = {name: np.zeros_like(row) for name, row in rows.items()}
        positions = {name: np.zeros_like(row) for name, row in rows.items()}
        ends = dict.fromkeys(rows, 0)
        inputs, weights = np.full_like(rows['decoder'], pad), np.zeros(self.lengths[1], np.float32)
        for number, span in enumerate(spans_of(example['segment_ids']), start=1):
            for name, tokens in zip(rows, self._sides(example['targets'][span], generator), strict=True):
                here = slice(ends[name], ends[name] + len(tokens))
                rows[name][here] = tokens
                segments[name][here] = number
                positions[name][here] = np.arange(len(tokens))
                if name == 'decoder':  # which reads padding first, as T5's does
                    inputs[here] = np.concatenate([[pad], tokens[:-1]])
                    weights[here] = 1
                ends[name] = here.stop
        return {
            'encoder_inputs': rows['encoder'],
            'encoder_segment_ids': segments['encoder'],
            'encoder_positions': positions['encoder'],
            'inputs': inputs,
            'targets': rows['decoder'],
            'loss_weights': weights,
            'segment_ids': segments['decoder'],
            'positions': positions['decoder'],
        }

    def _sides(self, tokens: Tokens, generator: np.random.Generator) -> tuple[Tokens, Tokens]:
        """What the encoder and the decoder get of one text."""
        denoisers, end = self.config.denoisers, self.boundaries.end
        rates = np.cumsum([each.rate for each in denoisers])
        denoiser = denoisers[int(np.searchsorted(rates, generator.random() * rates[-1], side='right'))]
        if len(tokens) and tokens[-1] == end:
            tokens = tokens[:-1]
        noise = denoiser.noise(len(tokens), generator)
        encoder, decoder = corrupt(tokens.astype(np.int32), noise, self.sentinels)
        mode = [] if denoiser.mode is None else [self.first_mode + denoiser.mode]
        return (np.concatenate([mode, encoder, [end]]).astype(np.int32), np.append(decoder, end).astype(np.int32))
