"""TensorFlow SavedModels of a model: StableHLO inside, parameters as variables, no JAX needed to run them.

`jax.export` makes the StableHLO, TensorFlow's operation XlaCallModule runs it. The one place outside `llm.data` that
imports TensorFlow, inside the functions that write. `serving_default` is the signature `logits`; the others keep their
names. TensorFlow holds all parameters in memory while it writes.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.mlir.dialects import stablehlo

from llm.interop.exporting.signatures import Signature
from llm.interop.safetensors import StoredTensor

_MAIN, _SERVED_AS = 'logits', 'serving_default'
# That of TensorFlow 2.21, which later ones read, too. jax.export writes for readers a few weeks older than JAX.
_STABLEHLO = '1.13.7'
# What JAX 0.12 writes for erfc: another name for a function beside it.
_COMPOSITE = re.compile(r'stablehlo\.composite "[^"]*" (.*?) \{.*?decomposition = (@[\w.]+).*?\}(?= : \()')


def write_saved_model(
    directory: Path, programs: Sequence[Signature], stored: Mapping[str, StoredTensor], platforms: Sequence[str]
) -> dict[str, str]:
    """Write the programs into a directory; gives the signature of each.

    Args:
        stored: the parameters by path.
        platforms: of JAX that it shall run on: 'cpu', 'cuda', 'tpu', 'rocm'.
    """
    import tensorflow as tf

    module = tf.Module()
    # Their order is that in which names are sorted, as JAX flattens dicts.
    module.parameters = [
        tf.Variable(stored[name].read(), trainable=False, name=name.replace('/', '.')) for name in sorted(stored)
    ]
    module.programs = []
    names, entries = {}, {}
    for program in programs:
        function = _as_tensorflow(program, stored, platforms, module.parameters)
        module.programs.append(function)
        names[program.name] = _SERVED_AS if program.name == _MAIN else program.name
        entries[names[program.name]] = function.get_concrete_function()
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(module, str(directory), signatures=entries, options=options)
    return names


def _portable(exported: jax.export.Exported) -> bytes:
    """The program in TensorFlow's StableHLO, with calls for composites, whose sizes TensorFlow cannot fill in."""
    return stablehlo.serialize_portable_artifact_str(
        _COMPOSITE.sub(r'func.call \2(\1)', exported.mlir_module()), _STABLEHLO
    )


def _as_tensorflow(
    program: Signature, stored: Mapping[str, StoredTensor], platforms: Sequence[str], variables: Sequence[Any]
) -> Any:
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.python import xla

    exported = jax.export.export(jax.jit(program.run), platforms=list(platforms))(
        {name: jax.ShapeDtypeStruct(each.shape, jnp.dtype(each.dtype)) for name, each in stored.items()},
        program.symbolic_inputs(),
    )
    attributes = {
        'version': exported.calling_convention_version,
        'module': _portable(exported),
        'platforms': [platform.upper() for platform in exported.platforms],
        'Tout': [tf.dtypes.as_dtype(array.dtype) for array in exported.out_avals],
        'Sout': [_known(array.shape) for array in exported.out_avals],
    }
    order = [array.name for array in program.inputs]

    def run(*arrays: Any) -> Any:
        given = dict(zip(order, arrays, strict=True))
        flat = [*variables, *(given[name] for name in sorted(given))]
        found = xla.call_module([flat[index] for index in exported.module_kept_var_idx], **attributes)
        return jax.tree.unflatten(exported.out_tree, found)

    signature = [
        tf.TensorSpec(_known(array.shape), tf.dtypes.as_dtype(jnp.dtype(array.dtype)), name=array.name)
        for array in program.inputs
    ]
    return tf.function(run, autograph=False, input_signature=signature)


def _known(shape: Sequence[Any]) -> list[int | None]:
    """A shape as TensorFlow writes it: None for a size that varies."""
    return [size if isinstance(size, int) else None for size in shape]
