"""A Hugging Face checkpoint: reading what a directory holds, and writing one from our parameters."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from llm.errors import UserError
from llm.interop.huggingface.families import FAMILIES
from llm.interop.huggingface.family import Family, described
from llm.interop.huggingface.settings import Settings
from llm.interop.loading import Pieces, check_tensors
from llm.interop.safetensors import DTYPES, StoredTensor, open_checkpoint, read_json
from llm.interop.safetensors_writing import NewTensor, write_checkpoint
from llm.interop.tables import Link, links, stack_links
from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.model import ModelConfig
from llm.models.parameters import named_specs, parameter_specs
from llm.models.stack import StackConfig

SETTINGS = 'config.json'
StoredType = Literal['float32', 'bfloat16', 'float16']
_MOST_NAMED = 5
_NAMES: dict[StoredType, str] = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}

# A piece of our array `path` at an index along its leading axes.
ReadPiece = Callable[[str, tuple[int, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a directory holds, checked but not read.

    Attributes:
        directory, family.
        config: of the model.
        sequence_length: that it was made for; None if the file does not say.
        pieces: the parameters.
    """

    directory: Path
    family: Family
    config: ModelConfig
    sequence_length: int | None
    pieces: Pieces

    @property
    def specs(self) -> dict[str, Any]:
        """The parameters' declarations."""
        return parameter_specs(self.config.build())


def open_directory(directory: str | Path, ignored_settings: tuple[str, ...] = ()) -> Checkpoint:
    """Read config.json and the headers of the tensors.

    Args:
        ignored_settings: names in config.json to pass over.

    Raises:
        UserError: the model is of no known family, a setting is unknown or not supported, a file is damaged, or the
            tensors are not those that the settings say.
    """
    directory = Path(directory).expanduser()
    file = directory / SETTINGS
    if not file.is_file():
        raise UserError(f'there is no {SETTINGS}', where=str(directory), fix='Give the directory of a checkpoint.')
    content = read_json(file)
    family = _family(content, str(file))
    config, sequence_length = read_settings(content, family, str(file), ignored_settings)
    stored = _by_present_name(open_checkpoint(directory), family)
    if family.parts is not None:
        config = family.parts(config, _present(family, stored))
    specs = parameter_specs(config.build())
    table = family_links(family, config, specs)
    expected = {link.name for link in table}
    tensors = _canonical(stored, family, expected | {name for pair in family.copies for name in pair})
    ignored = [name for name in tensors if any(re.fullmatch(pattern, name) for pattern in family.ignored)]
    if isinstance(config, DecoderConfig) and config.tied_embeddings:
        # Some programs write the tied table twice; transformers does not look at the second.
        ignored.append('lm_head.weight')
    ignored += _copies(tensors, family, expected, directory)
    check_tensors(tensors, table, str(directory), ignored)
    for link in table:
        if tensors[link.name].code not in DTYPES:
            raise UserError(
                f'{link.name} is of dtype {tensors[link.name].code}',
                where=str(directory),
                fix=f'Parameters can be {", ".join(DTYPES)}: get a checkpoint that is not quantized.',
            )
    return Checkpoint(directory, family, config, sequence_length, Pieces(tensors, table, specs))


def read_settings(
    content: Mapping[str, Any], family: Family, where: str, ignored: tuple[str, ...] = ()
) -> tuple[ModelConfig, int | None]:
    """Our config, and the length of rows that the model was made for.

    Raises:
        UserError: a setting is unknown, missing or not supported.
    """
    settings = Settings(content, where, ignored)
    settings.expect(quantization_config=None)
    config = family.read(settings)
    settings.finish()
    if isinstance(config, EncoderConfig):
        return config, config.longest
    longest = content.get('max_position_embeddings', content.get('n_positions'))
    return config, longest if type(longest) is int else None


def family_links(family: Family, config: ModelConfig, specs: Mapping[str, Any]) -> list[Link]:
    """The correspondence of the family's tensors with this model's parameters."""
    if isinstance(config, DecoderConfig):
        return links(family.table, specs, config.num_layers, config.location)

    def stack(of: StackConfig) -> tuple[int, Any]:
        return len(of.pattern) if of.shared_layers else of.num_layers, of.location

    if isinstance(config, EncoderConfig):
        return stack_links(family.table, specs, {'encoder': stack(config.layers)})
    return stack_links(family.table, specs, {'encoder': stack(config.encoder), 'decoder': stack(config.decoder)})


def _family(content: Mapping[str, Any], where: str) -> Family:
    kind = content.get('model_type')
    if kind not in FAMILIES:
        raise UserError(
            f'model_type is {kind!r:.60}', where=where, fix=f'Families that can be read: {", ".join(sorted(FAMILIES))}.'
        )
    family = FAMILIES[kind]
    classes = content.get('architectures')
    base = family.architecture.partition('For')[0].removesuffix('LMHeadModel') + 'Model'
    known = {family.architecture, base, *family.other_architectures}
    if classes is not None and not known & set(classes if isinstance(classes, list) else ()):
        raise UserError(
            f'architectures is {classes!r:.80}',
            where=where,
            fix=f'Of this family, {family.architecture} can be read.',
        )
    return family


def _by_present_name(tensors: Mapping[str, StoredTensor], family: Family) -> dict[str, StoredTensor]:
    """The tensors by the names that their kinds have today."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        new = name
        for old, present in family.renamed:
            new = re.sub(old, present, new)
        found[name if new in tensors else new] = tensor
    return found


def _present(family: Family, tensors: Collection[str]) -> set[str]:
    """The paths of our parameters outside of layers that there are tensors of."""
    names = {*tensors, *(family.prefix + name for name in tensors)}
    return {path for row in family.table if not row.per_layer and row.theirs in names for path in row.paths}


def _copies(
    tensors: Mapping[str, StoredTensor], family: Family, expected: Collection[str], directory: Path
) -> list[str]:
    """The tensors that say again what another says.

    Raises:
        UserError: one says something else: transformers would compute with it.
    """
    found = [pair for pair in family.copies if pair[0] in tensors and pair[0] not in expected and pair[1] in tensors]
    for copy, of in found:
        if tensors[copy].shape != tensors[of].shape or not np.array_equal(tensors[copy].read(), tensors[of].read()):
            raise UserError(
                f'{copy} is not {of}, to which it is tied',
                where=str(directory),
                fix='This model cannot be converted as it is.',
            )
    return [copy for copy, _ in found]


def _canonical(
    tensors: Mapping[str, StoredTensor], family: Family, expected: Collection[str]
) -> dict[str, StoredTensor]:
    """The tensors by full name: older checkpoints, and those of a model without a head, leave out the prefix."""
    if any(name.startswith(family.prefix) for name in tensors):
        return dict(tensors)
    return {family.prefix + name if family.prefix + name in expected else name: x for name, x in tensors.items()}


def find_family(config: ModelConfig, model_type: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The family that can describe a model, and the settings that do.

    Args:
        model_type: of the family; None for the first that can.

    Raises:
        UserError: it cannot be described: says what is different.
    """
    if model_type is not None and model_type not in FAMILIES:
        raise UserError(
            f'there is no family {model_type!r}', where='model_type', fix=f'Use one of {", ".join(sorted(FAMILIES))}.'
        )
    reasons: dict[str, list[str]] = {}
    distances: dict[str, int] = {}
    for name, family in FAMILIES.items():
        if model_type in (None, name):
            differences, settings = _describe(family, config)
            if not differences:
                return family, settings
            # Settings are empty for a model of another kind, which the family cannot even begin to describe.
            reasons[name], distances[name] = differences, len(differences) if settings else 100
    closest = model_type or min(distances, key=lambda name: distances[name])
    differences = reasons[closest]
    more = f'; and {len(differences) - _MOST_NAMED} more' if len(differences) > _MOST_NAMED else ''
    why = f'the model is no {closest}' + ('' if model_type else ', which is the closest of all families')
    why += f': {"; ".join(differences[:_MOST_NAMED])}{more}'
    raise UserError(
        why, where=type(config).__name__, fix="Keep it in llm's own format, or train a model that can be described."
    )


def _describe(family: Family, config: ModelConfig) -> tuple[list[str], dict[str, Any]]:
    """How the model differs from any that the family can describe, nothing if it does not; and the settings."""
    if not isinstance(config, family.kind):
        return [f'it is of another kind ({type(config).__name__}, not {family.kind.__name__})'], {}
    try:
        settings = {'model_type': family.model_type, **family.write(config)}
        found, _ = read_settings(settings, family, family.model_type)
        if family.parts is not None:
            found = family.parts(found, [name for name, _ in named_specs(parameter_specs(config.build()))])
    except UserError as error:
        return [error.what], {}
    except (AttributeError, TypeError) as error:
        # A layer without feed-forward, norm or heads: `write` assumes what `read` gives.
        return [f'its layers are of another kind ({error})'], {}
    return _differences(described(found), described(config)), settings


def _differences(theirs: Any, ours: Any, path: str = '') -> list[str]:
    """Where two configs differ, by field."""
    if type(theirs) is type(ours) and dataclasses.is_dataclass(ours):
        return [
            line
            for field in dataclasses.fields(ours)
            for line in _differences(getattr(theirs, field.name), getattr(ours, field.name), f'{path}.{field.name}')
        ]
    if isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        pairs = zip(theirs, ours, strict=True)
        return [line for i, pair in enumerate(pairs) for line in _differences(*pair, f'{path}[{i}]')]
    if isinstance(ours, float) and isinstance(theirs, float) and abs(ours - theirs) <= 1e-12 * abs(ours):
        return []
    return [] if theirs == ours else [f'{path.lstrip(".")} is {ours!r:.60}, not {theirs!r:.60}']


def write_directory(
    directory: str | Path,
    config: ModelConfig,
    read: ReadPiece,
    *,
    dtype: StoredType,
    shard_bytes: int = 5_000_000_000,
    sequence_length: int | None = None,
    model_type: str | None = None,
    extra_settings: Mapping[str, Any] | None = None,
) -> Family:
    """Write config.json and the tensors, one at a time, into a directory, made if need be.

    Args:
        read: gives the pieces of our parameters.
        dtype: of the tensors. shard_bytes: of a file, at most.
        sequence_length: that the model was trained on, for max_position_embeddings.
        model_type: see `find_family`.
        extra_settings: more of config.json (the ids of special tokens).

    Raises:
        UserError: no family can describe the model, a value does not fit `dtype`, or the directory cannot be written.
    """
    directory = Path(directory)
    family, settings = find_family(config, model_type)
    if sequence_length is not None and config.position == 'rope' and 'rope_scaling' not in settings:
        settings['max_position_embeddings'] = sequence_length
    specs = parameter_specs(config.build())
    by_name: dict[str, list[Link]] = {}
    for link in family_links(family, config, specs):
        by_name.setdefault(link.name, []).append(link)
    target = np.dtype(ml_dtypes.bfloat16 if dtype == 'bfloat16' else dtype)

    def make(parts: list[Link]) -> np.ndarray:
        out = np.empty(parts[0].layout.theirs, target)
        for link in parts:
            with np.errstate(over='ignore'):
                link.write(out, read(link.path, link.index))
        if dtype == 'float16' and not np.isfinite(out).all():
            raise UserError(
                f'{parts[0].name} has values that float16 cannot hold', where=str(directory), fix="Use 'bfloat16'."
            )
        return out

    tensors = [
        NewTensor(name, parts[0].layout.theirs, _NAMES[dtype], functools.partial(make, parts))
        for name, parts in by_name.items()
    ]
    # What the model computes by, the settings say: in RoBERTa, the id of padding.
    content = {'architectures': [family.architecture], **(extra_settings or {}), **settings, 'torch_dtype': dtype}
    directory.mkdir(parents=True, exist_ok=True)
    write_checkpoint(directory, tensors, shard_bytes)
    (directory / SETTINGS).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
    return family
