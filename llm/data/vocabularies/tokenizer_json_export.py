"""Vocabularies of every kind as a tokenizer.json, which `tokenizers` and transformers run, with the same ids.

What differs: in a text, `tokenizers` takes the names of special tokens for these unless told otherwise; it cannot tell
a true '▁' from a space, as SentencePiece itself cannot; and where a model of SentencePiece adds a space before a text,
it adds one behind every piece that its maker defined, too.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from llm.data.vocabularies.byte_alphabet import BYTE_ALPHABET, spelt
from llm.data.vocabularies.byte_level_bpe import ByteLevelBPE
from llm.data.vocabularies.byte_vocabulary import ByteVocabulary
from llm.data.vocabularies.sentencepiece_vocabulary import SentencePieceVocabulary
from llm.data.vocabularies.tiktoken_vocabulary import ENCODINGS, TiktokenVocabulary
from llm.data.vocabularies.tokenizer_json import FILE, TokenizerJson
from llm.data.vocabularies.vocabulary import Vocabulary
from llm.errors import UserError

if TYPE_CHECKING:
    import tokenizers


def as_tokenizer_json(vocabulary: Vocabulary, *, ends: bool = False) -> bytes:
    """The content of a tokenizer.json; bos, where it is not eos as well, begins every text there.

    Args:
        ends: whether eos ends every text there.

    Raises UserError for a SentencePiece model that normalises in a way that such a file cannot express.
    """
    if isinstance(vocabulary, TokenizerJson):
        return vocabulary.files()[FILE]
    from tokenizers import AddedToken, processors

    tokenizer = _EXPORTERS[type(vocabulary)](vocabulary)
    names = sorted(vocabulary.special_ids, key=vocabulary.special_ids.__getitem__)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    bos, eos = vocabulary.roles['bos'], vocabulary.roles['eos'] if ends else None
    bos = bos if ends or vocabulary.bos_id != vocabulary.eos_id else None
    if bos is not None or eos is not None:
        before, after = ([] if name is None else [name] for name in (bos, eos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, '$A', *after],
            pair=[*before, '$A', *after, *(f'{name}:1' for name in before), '$B:1', *(f'{name}:1' for name in after)],
            special_tokens=[(name, vocabulary.special_ids[name]) for name in {*before, *after}],
        )
    for name, token in vocabulary.special_ids.items():
        if tokenizer.token_to_id(name) != token:
            raise UserError(f'special token {name!r} with id {token} does not fit into a tokenizer.json')
    return tokenizer.to_str(pretty=True).encode()


def _bytes(vocabulary: ByteVocabulary) -> 'tokenizers.Tokenizer':
    first = len(vocabulary.special_ids)
    ids = {character: first + byte for byte, character in enumerate(BYTE_ALPHABET)}
    return _byte_level({**vocabulary.special_ids, **ids}, [])


def _byte_level_bpe(vocabulary: ByteLevelBPE) -> 'tokenizers.Tokenizer':
    tokenizer = _byte_level({**vocabulary.special_ids, **vocabulary.token_ids}, vocabulary.merges)
    tokenizer.pre_tokenizer = _pre_tokenizers().ByteLevel(add_prefix_space=False, use_regex=True)
    return tokenizer


def _tiktoken(vocabulary: TiktokenVocabulary) -> 'tokenizers.Tokenizer':
    import tokenizers

    ids = {spelt(content): rank for content, rank in vocabulary.ranks.items()}
    # tiktoken looks for a whole part first, and does not merge what it finds.
    tokenizer = _byte_level({**ids, **vocabulary.special_ids}, _all_merges(ids), ignore_merges=True)
    split = tokenizers.Regex(ENCODINGS[vocabulary.encoding].split)
    whole_parts = _pre_tokenizers().ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = _pre_tokenizers().Sequence([_pre_tokenizers().Split(split, 'isolated'), whole_parts])
    return tokenizer


def _byte_level(ids: Mapping[str, int], merges: Iterable[tuple[str, str]], **settings: Any) -> 'tokenizers.Tokenizer':
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE(vocab=dict(ids), merges=list(merges), **settings))
    tokenizer.pre_tokenizer = _pre_tokenizers().ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: SentencePieceVocabulary) -> 'tokenizers.Tokenizer':
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    proto = vocabulary.proto
    trainer, rules, kinds = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
    if trainer.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise UserError('a SentencePiece model that treats spaces in its own way cannot become a tokenizer.json')
    fallback, unknown = trainer.byte_fallback, vocabulary.roles['unk']
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    model: Any
    if trainer.model_type == trainer.UNIGRAM:
        model = models.Unigram(pieces, vocabulary.unk_id, fallback)
    elif trainer.model_type == trainer.BPE:
        # SentencePiece merges the neighbours whose piece has the highest score, whatever they are.
        order = {piece.piece: -piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        merges = _all_merges(order)
        model = models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
    else:
        raise UserError('a SentencePiece model of words or characters cannot become a tokenizer.json')
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(' {2,}'), ' ')]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend('▁'))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(' ', '▁')])
    ending = [decoders.Strip(' ', 1, 0)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), *ending]
    )
    own = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in own])
    return tokenizer


def _all_merges(order: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of tokens that together are a token, by the order of what they make."""
    merges = []
    for token in sorted(order, key=order.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in order and token[i:] in order]
        merges += sorted(pairs, key=lambda pair: (order[pair[0]], order[pair[1]]))
    return merges


def _pre_tokenizers() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers


_EXPORTERS: dict[type[Vocabulary], Callable[[Any], 'tokenizers.Tokenizer']] = {
    ByteVocabulary: _bytes,
    ByteLevelBPE: _byte_level_bpe,
    TiktokenVocabulary: _tiktoken,
    SentencePieceVocabulary: _sentencepiece,
}
