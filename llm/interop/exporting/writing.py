"""A model into a directory of programs: parameters, graphs, manifest. One function for every format."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from llm.errors import UserError
from llm.interop.exporting import onnx_graphs, saved_model, signatures, stablehlo
from llm.interop.exporting.manifest import write_manifest
from llm.interop.exporting.packages import check_installed
from llm.interop.exporting.stored_parameters import FILE, write_parameters
from llm.models.low_rank import ReadPiece
from llm.models.model import ModelConfig
from llm.models.parameters import named_specs, parameter_specs

ProgramFormat = Literal['onnx', 'saved_model', 'jax_export']
PLATFORMS = ('cpu', 'cuda', 'tpu')
_KNOWN_PLATFORMS = (*PLATFORMS, 'rocm')
_PACKAGES: dict[ProgramFormat, tuple[str, ...]] = {
    'onnx': ('jax2onnx', 'onnx_ir'),
    'saved_model': ('tensorflow', 'jax.experimental.jax2tf'),
    'jax_export': (),
}
# Axes along which layers are stacked; see llm.models.parameters.stack.
_STACKED = ('layers', 'remainder')


def check_exportable(config: ModelConfig, to: ProgramFormat, platforms: Sequence[str]) -> None:
    """Raises UserError where this model cannot be such a program, or what writes it is not installed."""
    signatures.check(config)
    if not platforms or not set(platforms) <= set(_KNOWN_PLATFORMS):
        raise UserError(f'platforms are {tuple(platforms)!r}', fix=f'Use some of {", ".join(_KNOWN_PLATFORMS)}.')
    if to not in get_args(ProgramFormat):
        raise ValueError(f'no format is called {to!r}')
    if to == 'onnx':
        onnx_graphs.check_supported()
    check_installed(_PACKAGES[to], to)


def write_programs(
    directory: Path,
    to: ProgramFormat,
    config: ModelConfig,
    read: ReadPiece,
    dtypes: Mapping[str, str],
    *,
    platforms: Sequence[str] = PLATFORMS,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as programs.

    Args:
        directory: there, and empty.
        read: gives slices of parameters. dtypes: that they get, by path.
        about: for the manifest.

    Raises:
        UserError: see `check_exportable`; or the directory cannot be written.
    """
    check_exportable(config, to, platforms)
    named = named_specs(parameter_specs(config.build()))
    stored = write_parameters(directory, {path: spec.shape for path, spec in named}, dtypes, read)
    programs = signatures.signatures(config, scan=to != 'onnx')
    places: Mapping[str, Mapping[str, Any]]
    if to == 'onnx':
        stacked = {path for path, spec in named if spec.axes[:1] and spec.axes[0] in _STACKED}
        files = onnx_graphs.write_onnx(directory, programs, stored, stacked)
        places = {name: {'file': file} for name, file in files.items()}
    elif to == 'saved_model':
        names = saved_model.write_saved_model(directory, programs, stored, platforms)
        places = {name: {'signature': served} for name, served in names.items()}
        (directory / FILE).unlink()  # they are variables now
    else:
        places = stablehlo.write_stablehlo(directory, programs, stored, platforms)
    more = {'vocab_size': config.vocab_size, 'compute_dtype': config.compute_dtype, **(about or {})}
    if to != 'onnx':
        more['platforms'] = list(platforms)
    write_manifest(directory, to, programs, places, more)
