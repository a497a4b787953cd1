"""Vocabularies from and to a Hugging Face directory: the tokenizer's files, and who is bos, eos, pad and unk."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm.data.vocabularies import storage, tiktoken_vocabulary, tokenizer_json
from llm.data.vocabularies.byte_level_bpe import ByteLevelBPE
from llm.data.vocabularies.sentencepiece_vocabulary import SentencePieceVocabulary
from llm.data.vocabularies.tiktoken_vocabulary import TiktokenVocabulary
from llm.data.vocabularies.tokenizer_json import TokenizerJson
from llm.data.vocabularies.tokenizer_json_export import as_tokenizer_json
from llm.data.vocabularies.vocabulary import Vocabulary
from llm.data.vocabularies.wordpiece import wordpiece_json
from llm.errors import UserError

_CONFIG, _MAP, _TEMPLATE = 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja'
# Where T5, ALBERT and others keep the same thing. (XLM-RoBERTa's sentencepiece.bpe.model has ids of its own.)
_MODELS = ('tokenizer.model', 'spiece.model')
# An encoder's document lies between [CLS] and [SEP].
_ROLE_KEYS = {'pad': ('pad',), 'eos': ('eos', 'sep'), 'bos': ('bos', 'cls'), 'unk': ('unk',)}
# Taken for bos and eos where no file says a word of them and the tokenizer has them as special tokens.
_CONVENTIONAL = {
    'bos': ('<s>', '<bos>', '<|begin_of_text|>', '[CLS]', '<|endoftext|>'),
    'eos': ('</s>', '<eos>', '<|end_of_text|>', '[SEP]', '<|endoftext|>'),
}
_MOST_SENTINELS = 10_000
_MASKS = ('[MASK]', '<mask>')
# Those whose vocab.json and merges.txt are used with GPT-2's split.
_GPT2_LIKE = {'GPT2Tokenizer', 'RobertaTokenizer', 'BartTokenizer', 'PreTrainedTokenizerFast', 'TokenizersBackend'}


def read_vocabulary(directory: Path) -> Vocabulary | None:
    """The vocabulary of a Hugging Face directory, or one with GPT-2's or tiktoken's files; None where there is none.

    In this order: tokenizer.json; a SentencePiece model or Llama 3's ranks as tokenizer.model; a .tiktoken file;
    encoder.json and vocab.bpe, also as vocab.json and merges.txt; vocab.txt (BERT's WordPiece).

    Raises UserError where a file is damaged, or says what the others contradict.
    """
    if (path := directory / tokenizer_json.FILE).exists():
        return read_tokenizer_json(path)
    for path in [*(directory / name for name in _MODELS), *sorted(directory.glob('*.tiktoken'))]:
        if path.exists():
            vocabulary = read_model(path)
            if isinstance(vocabulary, SentencePieceVocabulary) and (extra := _t5_sentinels(directory)):
                vocabulary = vocabulary.with_special_tokens([f'<extra_id_{i}>' for i in reversed(range(extra))])
            _refuse_added_tokens(directory, path, vocabulary)
            return vocabulary
    if (directory / 'encoder.json').exists() or (directory / 'vocab.json').exists():
        kind = _object(directory / _CONFIG).get('tokenizer_class') or 'GPT2Tokenizer'
        if str(kind).removesuffix('Fast') not in {name.removesuffix('Fast') for name in _GPT2_LIKE}:
            raise UserError(
                f'has no tokenizer.json, and how a {kind} splits text is not known here',
                where=str(directory),
                fix="Save it with transformers' AutoTokenizer, which writes a tokenizer.json",
            )
        return ByteLevelBPE.from_gpt2_files(directory, _read_roles(directory, None))
    if (path := directory / 'vocab.txt').exists():
        content = _wordpiece_as_json(directory, path)
        return _named(path, lambda: _with_roles(content, directory))
    return None


def read_model(path: Path) -> Vocabulary:
    """A SentencePiece model or a rank file of tiktoken: both are called tokenizer.model. Raises UserError."""
    content = storage.read_bytes(path)
    if tiktoken_vocabulary.looks_like_ranks(content):
        return _named(path, lambda: TiktokenVocabulary(content))
    return _named(path, lambda: SentencePieceVocabulary(content))


def read_tokenizer_json(path: Path) -> TokenizerJson:
    """A tokenizer.json under any name, with the roles that the files beside it give. Raises UserError."""
    content = storage.read_bytes(path)
    return _named(path, lambda: _with_roles(content, path.parent))


def write_vocabulary(
    vocabulary: Vocabulary,
    directory: str | os.PathLike[str],
    *,
    chat_template: str | None = None,
    max_length: int | None = None,
    ends: bool = False,
) -> None:
    """Write the files from which transformers' AutoTokenizer makes a tokenizer with the same ids.

    Args:
        directory: may hold other files; those of a tokenizer are written over.
        chat_template: source of a Jinja template, for `apply_chat_template`.
        max_length: tokens that the model takes.
        ends: whether the end of a document follows every text, as encoders read it. A tokenizer.json from elsewhere
            says so itself.

    Raises UserError where the vocabulary cannot be written as a tokenizer.json, or the directory cannot be written.
    """
    tokens = {f'{role}_token': name for role, name in vocabulary.roles.items() if name is not None}
    if mask := next((name for name in _MASKS if name in vocabulary.special_ids), None):
        tokens['mask_token'] = mask
    config: dict[str, Any] = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'clean_up_tokenization_spaces': False,
        **tokens,
    }
    if max_length is not None:
        config['model_max_length'] = max_length
    files = {
        tokenizer_json.FILE: as_tokenizer_json(vocabulary, ends=ends),
        _CONFIG: _as_json(config),
        _MAP: _as_json(tokens),
    }
    if isinstance(vocabulary, SentencePieceVocabulary):
        files[_MODELS[0]] = vocabulary.model
    if chat_template is not None:
        files[_TEMPLATE] = chat_template.encode()
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (path / name).write_bytes(content)
    except OSError as error:
        raise UserError(f'cannot write a tokenizer ({error.strerror})', where=str(path)) from error


def read_chat_templates(directory: str | os.PathLike[str]) -> dict[str, str]:
    """The chat templates of a Hugging Face directory by name, that without a name as 'default'. Raises UserError."""
    path = Path(directory)
    templates: dict[str, str] = {}
    found = _object(path / _CONFIG).get('chat_template')
    if isinstance(found, str):
        templates['default'] = found
    elif isinstance(found, list):
        for each in found:
            if not isinstance(each, dict) or not all(isinstance(each.get(key), str) for key in ('name', 'template')):
                raise storage.damaged(path / _CONFIG, 'has chat templates that are not named strings')
            templates[each['name']] = each['template']
    elif found is not None:
        raise storage.damaged(path / _CONFIG, 'has a chat template that is no string')
    files = {each.stem: each for each in sorted((path / 'additional_chat_templates').glob('*.jinja'))}
    if (path / _TEMPLATE).exists():
        files['default'] = path / _TEMPLATE
    for name, file in files.items():
        try:
            templates[name] = storage.read_bytes(file).decode()
        except UnicodeDecodeError as error:
            raise storage.damaged(file, 'is not UTF-8') from error
    return templates


def _with_roles(content: bytes, directory: Path) -> TokenizerJson:
    names, special = tokenizer_json.token_names(content)
    roles = _read_roles(directory, names)
    if not {'bos', 'eos'} & set(roles):
        for role, usual in _CONVENTIONAL.items():
            roles[role] = next((name for name in usual if name in special), None)
    return TokenizerJson(content, roles)


def _read_roles(directory: Path, names: Mapping[int, str] | None) -> dict[str, str | None]:
    """The names of bos, eos, pad and unk, from the first file that says anything of them, null included.

    Args:
        names: tokens by id, for the files that give ids; None to leave these out.
    """
    roles: dict[str, str | None] = {}
    for file in (_CONFIG, _MAP, 'generation_config.json', 'config.json'):
        path = directory / file
        described = _object(path)
        for role, keys in _ROLE_KEYS.items():
            for key in keys:
                if role not in roles and f'{key}_token' in described:
                    name = described[f'{key}_token']
                    name = name.get('content') if isinstance(name, dict) else name
                    if name is not None and not isinstance(name, str):
                        raise storage.damaged(path, f'gives a {key}_token that is no string')
                    roles[role] = name
            token = described.get(f'{role}_token_id')
            token = token[0] if isinstance(token, list) and token else token
            if role not in roles and isinstance(token, int) and names is not None:
                roles[role] = names.get(token)
    return roles


def _refuse_added_tokens(directory: Path, path: Path, vocabulary: Vocabulary) -> None:
    """A model file is not all of a tokenizer to which tokens were added."""
    added = {int(i) for i in _object(directory / _CONFIG).get('added_tokens_decoder', {})}
    added |= {int(i) for i in _object(directory / 'added_tokens.json').values()}
    if beyond := sorted(token for token in added if token >= vocabulary.size):
        raise UserError(
            f'has {vocabulary.size} tokens, but {len(beyond)} more were added from id {beyond[0]} on',
            where=str(path),
            fix="Save it with transformers' AutoTokenizer, which writes a tokenizer.json",
        )


def _t5_sentinels(directory: Path) -> int:
    """How many sentinels T5's tokenizer adds to its SentencePiece model: that is not in the model."""
    config = _object(directory / _CONFIG)
    kind = str(config.get('tokenizer_class') or '').removesuffix('Fast')
    if kind != 'T5Tokenizer' and (kind or _object(directory / 'config.json').get('model_type') != 't5'):
        return 0
    extra = config.get('extra_ids', 100)
    if type(extra) is not int or not 0 <= extra <= _MOST_SENTINELS:
        raise storage.damaged(directory / _CONFIG, f'gives {extra!r:.40} as extra_ids')
    return extra


def _wordpiece_as_json(directory: Path, path: Path) -> bytes:
    """BERT's vocab.txt, one token a line, as the tokenizer.json that `tokenizers` makes of it."""
    try:
        tokens = storage.read_bytes(path).decode().rstrip('\n').split('\n')
    except UnicodeDecodeError as error:
        raise storage.damaged(path, 'is not UTF-8') from error
    if len(set(tokens)) < len(tokens):
        raise storage.damaged(path, 'has a token twice')
    config = _object(directory / _CONFIG)
    ids = {token.removesuffix('\r'): i for i, token in enumerate(tokens)}
    special = [name for name in ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]') if name in ids]
    if '[UNK]' not in special:
        raise storage.damaged(path, 'has no [UNK]: this is no vocab.txt of BERT')
    return wordpiece_json(
        ids,
        special,
        lowercase=config.get('do_lower_case', True),
        strip_accents=config.get('strip_accents'),
        split_chinese=config.get('tokenize_chinese_chars', True),
    )


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no file."""
    if not path.exists():
        return {}
    found = storage.read_json(path)
    if not isinstance(found, dict):
        raise storage.damaged(path, 'is not a JSON object')
    return found


def _as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + '\n').encode()


def _named(path: Path, make: Any) -> Any:
    try:
        return make()
    except UserError as error:
        if error.where:
            raise
        raise UserError(error.what, where=str(path), fix=error.fix) from error
