"""What the files of sentence-transformers beside a model say: how the states of its tokens become one vector.

modules.json lists what runs one after another: a Transformer, a Pooling, perhaps a Normalize. Anything else, a Dense
layer for one, is refused by name.
"""

import json
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.interop.safetensors import read_json
from llm.models.pooling import PoolingConfig, PoolingKind

_MODULES, _POOLING, _LENGTH = 'modules.json', '1_Pooling', 'sentence_bert_config.json'
_PACKAGE = 'sentence_transformers.models'
# Their modes, and the settings that said so before release 5.
_MODES: dict[str, PoolingKind] = {'mean': 'mean', 'cls': 'first', 'lasttoken': 'last'}
_LEGACY = {
    'pooling_mode_cls_token': 'cls',
    'pooling_mode_max_tokens': 'max',
    'pooling_mode_mean_tokens': 'mean',
    'pooling_mode_mean_sqrt_len_tokens': 'mean_sqrt_len_tokens',
    'pooling_mode_weightedmean_tokens': 'weightedmean',
    'pooling_mode_lasttoken': 'lasttoken',
}


def read_pooling(directory: Path) -> tuple[PoolingConfig | None, int | None]:
    """The pooling, and the most tokens of a text; None where there is no modules.json, or no limit.

    Raises:
        UserError: the model does more than pooling and normalisation, or pools as we do not.
    """
    file = directory / _MODULES
    if not file.is_file():
        return None, None
    modules = _read_any(file)
    if not isinstance(modules, list) or not all(isinstance(each, dict) for each in modules):
        raise UserError('is no list of modules', where=str(file), fix='Take the file from where it was made.')
    kinds = [str(each.get('type', '')).rpartition('.')[2] for each in modules]
    if kinds[:2] != ['Transformer', 'Pooling'] or kinds[2:] not in ([], ['Normalize']):
        raise UserError(
            f'the modules are {", ".join(kinds) or "none"}; supported are Transformer, Pooling and Normalize',
            where=str(file),
            fix='Without modules.json, the model under them can be converted.',
        )
    if modules[0].get('path') not in ('', None):
        raise UserError(
            f'the Transformer is in {modules[0]["path"]!r:.60}',
            where=str(file),
            fix='Move its files beside modules.json, and make its path empty.',
        )
    _check_prompt(directory / 'config_sentence_transformers.json')
    name = modules[1].get('path')
    if not isinstance(name, str) or Path(name).is_absolute() or '..' in Path(name).parts:
        raise UserError(f'the path of Pooling is {name!r:.60}', where=str(file), fix=f'Use {_POOLING!r}.')
    kind = _read_mode(directory / name / 'config.json')
    return PoolingConfig(kind, normalize=kinds[2:] == ['Normalize']), _read_length(directory / _LENGTH)


def write_pooling(directory: Path, pooling: PoolingConfig, d_model: int, max_length: int | None) -> None:
    """Write the files from which sentence-transformers makes a model that pools so."""
    modes = {ours: theirs for theirs, ours in _MODES.items()}
    types = ['Transformer', 'Pooling', *(['Normalize'] if pooling.normalize else [])]
    modules = [
        {'idx': i, 'name': str(i), 'path': f'{i}_{kind}' if i else '', 'type': f'{_PACKAGE}.{kind}'}
        for i, kind in enumerate(types)
    ]
    settings = {
        'word_embedding_dimension': d_model,
        **{name: mode == modes[pooling.kind] for name, mode in _LEGACY.items()},
    }
    files: dict[str, Any] = {_MODULES: modules, f'{_POOLING}/config.json': settings}
    if max_length is not None:
        files[_LENGTH] = {'max_seq_length': max_length, 'do_lower_case': False}
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
    if pooling.normalize:
        (directory / f'2_{types[2]}').mkdir(exist_ok=True)


def _read_mode(file: Path) -> PoolingKind:
    settings = read_json(file)
    found: Any = settings.get('pooling_mode')
    if found is None:
        found = [mode for name, mode in _LEGACY.items() if settings.get(name)] or ['mean']
    modes = found if isinstance(found, list) else [found]
    if len(modes) != 1 or not isinstance(modes[0], str) or modes[0] not in _MODES:
        raise UserError(
            f'pooling_mode is {found!r:.80}', where=str(file), fix=f'Only one of {", ".join(_MODES)} can be converted.'
        )
    return _MODES[modes[0]]


def _read_length(file: Path) -> int | None:
    settings = read_json(file) if file.is_file() else {}
    if settings.get('do_lower_case'):
        raise UserError(
            'do_lower_case is true: texts are in lower case before the tokenizer sees them',
            where=str(file),
            fix='Set it to false if the tokenizer does the same.',
        )
    length = settings.get('max_seq_length')
    if length is not None and (type(length) is not int or length < 1):
        raise UserError(f'max_seq_length is {length!r:.60}', where=str(file), fix='Use a whole number, or null.')
    return length


def _check_prompt(file: Path) -> None:
    name = read_json(file).get('default_prompt_name') if file.is_file() else None
    if name is not None:
        raise UserError(
            f'default_prompt_name is {name!r:.60}: a prompt before every text',
            where=str(file),
            fix='Set it to null, and put the prompt before your texts.',
        )


def _read_any(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f'cannot be read as JSON ({error})', where=str(file), fix='Take the file from where it was made.'
        ) from error
