"""StableHLO programs of a model, as `jax.export` serializes them: a file for each signature, parameters beside them.

Parameters are arguments, so a program is as small as its graph. With JAX alone, `parameters` a dict of arrays:

    exported = jax.export.deserialize(Path('logits.stablehlo').read_bytes())
    parameters = safetensors.numpy.load_file('model.safetensors')
    exported.call(parameters, {'tokens': tokens})['logits']
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm.errors import UserError
from llm.interop.exporting.manifest import read_manifest
from llm.interop.exporting.signatures import Signature
from llm.interop.safetensors import StoredTensor, open_checkpoint

Program = Callable[[Mapping[str, Any]], dict[str, jax.Array]]


def write_stablehlo(
    directory: Path, programs: Sequence[Signature], stored: Mapping[str, StoredTensor], platforms: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Write the programs; gives the file of each signature, and the version of the calling convention.

    Args:
        stored: the parameters by path. platforms: 'cpu', 'cuda', 'tpu', 'rocm'.
    """
    parameters = {name: jax.ShapeDtypeStruct(each.shape, jnp.dtype(each.dtype)) for name, each in stored.items()}
    files: dict[str, dict[str, Any]] = {}
    for program in programs:
        exported = jax.export.export(jax.jit(program.run), platforms=list(platforms))(
            parameters, program.symbolic_inputs()
        )
        name = f'{program.name}.stablehlo'
        (directory / name).write_bytes(exported.serialize())
        files[program.name] = {'file': name, 'calling_convention_version': exported.calling_convention_version}
    return files


def load_programs(directory: str | Path) -> dict[str, Program]:
    """The programs in a directory by name, with their parameters on the default device.

    Each takes a dict of arrays, as manifest.json names them, and gives one.

    Raises:
        UserError: this is no such directory, or its programs were made for other platforms.
    """
    directory = Path(directory)
    manifest = read_manifest(directory, 'jax_export')
    here = jax.default_backend()
    platform = 'cuda' if here == 'gpu' else here
    parameters = {name: jnp.asarray(np.asarray(each.read())) for name, each in open_checkpoint(directory).items()}
    programs: dict[str, Program] = {}
    for name, described in manifest['signatures'].items():
        exported = jax.export.deserialize(bytearray((directory / described['file']).read_bytes()))
        if platform not in exported.platforms:
            raise UserError(
                f'its programs were made for {", ".join(exported.platforms)}, and this is {platform}',
                where=str(directory),
                fix='Export it again, with Convert.platforms.',
            )
        programs[name] = functools.partial(jax.jit(exported.call), parameters)
    return programs
