"""SentencePiece in a GGUF file: BPE by scores ('llama'), and unigram models ('t5').

llama.cpp normalises nothing for BPE, and nothing that it cannot tell is unknown to a unigram model falls back to bytes.
"""

from typing import Any

from llm.data.vocabularies import SentencePieceVocabulary
from llm.errors import UserError
from llm.interop.gguf.tokens import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Stored, broken

BPE, UNIGRAM = 'llama', 't5'


def _kinds(types: Any) -> dict[int, int]:
    """SentencePiece's number of a kind of piece for each of llama.cpp's."""
    return {
        NORMAL: types.NORMAL,
        UNKNOWN: types.UNKNOWN,
        CONTROL: types.CONTROL,
        USER_DEFINED: types.USER_DEFINED,
        UNUSED: types.UNUSED,
        BYTE: types.BYTE,
    }


def read_sentencepiece(stored: Stored) -> SentencePieceVocabulary:
    """The vocabulary of such a file.

    Raises:
        UserError: it has no scores, or its normalisation is none.
    """
    from sentencepiece import sentencepiece_model_pb2

    metadata, tokens, kinds, ids = stored.metadata, stored.tokens, stored.kinds, stored.ids
    scores = metadata.get('scores')
    if not isinstance(scores, list) or len(scores) != len(tokens) or not all(type(each) is float for each in scores):
        raise broken(stored.where, f'has {len(tokens)} tokens and no score for each')
    proto: Any = vars(sentencepiece_model_pb2)['ModelProto']()
    by_kind = _kinds(proto.SentencePiece)
    if ids['unk'] is None and UNKNOWN in kinds:
        ids = {**ids, 'unk': kinds.index(UNKNOWN)}
    for i, (token, score, kind) in enumerate(zip(tokens, scores, kinds, strict=True)):
        # SentencePiece wants one unknown token, and that is it.
        kind = UNKNOWN if i == ids['unk'] else CONTROL if kind == UNKNOWN else kind  # noqa: PLW2901
        proto.pieces.add(piece=token, score=score, type=by_kind.get(kind, proto.SentencePiece.NORMAL))
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    bpe = metadata['model'] == BPE
    trainer.model_type, trainer.vocab_size = trainer.BPE if bpe else trainer.UNIGRAM, len(tokens)
    trainer.byte_fallback = BYTE in kinds
    for role, index in ids.items():
        setattr(trainer, f'{role}_id', -1 if index is None else index)
        if index is not None:
            setattr(trainer, f'{role}_piece', tokens[index])
    rules.name, rules.escape_whitespaces = 'identity', True
    # Where a file says nothing, llama.cpp adds a space for BPE alone.
    rules.add_dummy_prefix = bool(metadata.get('add_space_prefix', bpe))
    rules.remove_extra_whitespaces = not bpe and bool(metadata.get('remove_extra_whitespaces', False))
    table = metadata.get('precompiled_charsmap')
    if table is not None and not bpe:
        if not isinstance(table, list) or not all(type(each) is int and -128 <= each < 256 for each in table):
            raise broken(stored.where, 'has a precompiled_charsmap that is not of bytes')
        rules.precompiled_charsmap = bytes(each & 0xFF for each in table)
    return SentencePieceVocabulary(proto.SerializeToString())


def write_sentencepiece(vocabulary: SentencePieceVocabulary) -> dict[str, Any]:
    """Keys for a vocabulary.

    Raises:
        UserError: llama.cpp would give other ids.
    """
    proto = vocabulary.proto
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    bpe, unigram = trainer.model_type == trainer.BPE, trainer.model_type == trainer.UNIGRAM
    if bpe and not rules.precompiled_charsmap and not rules.remove_extra_whitespaces:
        found: dict[str, Any] = {'model': BPE}
    elif unigram and not trainer.byte_fallback and rules.add_dummy_prefix and not trainer.treat_whitespace_as_suffix:
        found = {'model': UNIGRAM, 'remove_extra_whitespaces': rules.remove_extra_whitespaces}
        if rules.precompiled_charsmap:
            found['precompiled_charsmap'] = rules.precompiled_charsmap
    else:
        raise UserError(
            'of SentencePiece, llama.cpp runs BPE without normalisation, and unigram models that put a space before a '
            'text and have no byte fallback',
            where='the vocabulary',
            fix='Train the model with a vocabulary of kind byte_level_bpe, or export it to a Hugging Face directory.',
        )
    kinds = {theirs: ours for ours, theirs in _kinds(proto.SentencePiece).items()}
    return found | {
        'pre': 'default',
        'tokens': [piece.piece for piece in proto.pieces],
        'scores': [float(piece.score) for piece in proto.pieces],
        'token_type': [kinds.get(piece.type, NORMAL) for piece in proto.pieces],
        'add_space_prefix': rules.add_dummy_prefix,
    }
