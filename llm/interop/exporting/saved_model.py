"""TensorFlow SavedModels of a model, by jax2tf: StableHLO inside, parameters as variables, no JAX needed to run them.

The one place outside `llm.data` that imports TensorFlow, inside the function that writes. `serving_default` is the
signature `logits`; the others keep their names. TensorFlow holds all parameters in memory while it writes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llm.interop.exporting.signatures import Signature
from llm.interop.safetensors import StoredTensor

_MAIN, _SERVED_AS = 'logits', 'serving_default'


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


def _as_tensorflow(
    program: Signature, stored: Mapping[str, StoredTensor], platforms: Sequence[str], variables: Sequence[Any]
) -> Any:
    import tensorflow as tf
    from jax.experimental import jax2tf

    order = [array.name for array in program.inputs]

    def run(parameters: list[jax.Array], *arrays: jax.Array) -> dict[str, jax.Array]:
        return program.run(dict(zip(sorted(stored), parameters, strict=True)), dict(zip(order, arrays, strict=True)))

    converted = jax2tf.convert(
        run,
        polymorphic_shapes=[None, *(', '.join(map(str, array.shape)) for array in program.inputs)],
        polymorphic_constraints=program.constraints,
        native_serialization_platforms=tuple(platforms),
        with_gradient=False,
    )
    signature = [
        tf.TensorSpec(
            [size if isinstance(size, int) else None for size in array.shape],
            tf.dtypes.as_dtype(jnp.dtype(array.dtype)),
            name=array.name,
        )
        for array in program.inputs
    ]
    return tf.function(lambda *arrays: converted(variables, *arrays), autograph=False, input_signature=signature)
