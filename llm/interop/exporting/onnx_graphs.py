"""ONNX graphs of a model, by jax2onnx: a file for each signature, and the parameters in one file beside them.

jax2onnx traces functions of its own patched `jax.numpy`, which does not know all that our models do with sizes that
vary. So they are traced by JAX first, and jax2onnx sees primitives alone. Layers are written out one after the other,
and each reads its own part of the stacked parameters in place: a loop would copy them at every turn.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp

from llm.errors import UserError
from llm.interop.exporting.packages import without_logs
from llm.interop.exporting.signatures import Signature
from llm.interop.safetensors import StoredTensor

# Of the standard: 18 or later is what onnxruntime has had since 2023.
_OPSET = 21
# From 0.12 on, JAX has no ClosedJaxpr of its own, which jax2onnx up to 0.17.1 looks for.
SUPPORTED = jax.__version_info__ < (0, 12)
_Layer = tuple[int, int]  # argument, layer


def check_supported() -> None:
    """Raises UserError where jax2onnx does not know this JAX."""
    if not SUPPORTED:
        raise UserError(
            f'jax2onnx cannot read programs of jax {jax.__version__}',
            fix='Use an environment with a jax below 0.12 (Python 3.11 gets one from constraints/python3.11.txt).',
        )


def write_onnx(
    directory: Path, programs: Sequence[Signature], stored: Mapping[str, StoredTensor], stacked: Collection[str]
) -> dict[str, str]:
    """Write the graphs; gives the file of each signature.

    Args:
        stored: the parameters by path, in one file of `directory`.
        stacked: the parameters that hold layers along their first axis.
    """
    files = {}
    for program in programs:
        files[program.name] = f'{program.name}.onnx'
        _write_graph(directory / files[program.name], program, stored, stacked)
    return files


def _write_graph(path: Path, program: Signature, stored: Mapping[str, StoredTensor], stacked: Collection[str]) -> None:
    import jax2onnx
    import onnx_ir

    inputs = program.symbolic_inputs()
    parameters = {name: jax.ShapeDtypeStruct(each.shape, jnp.dtype(each.dtype)) for name, each in stored.items()}
    traced = jax.make_jaxpr(program.run)(parameters, inputs)
    # As JAX flattens dicts.
    names, shapes = [*sorted(parameters), *sorted(inputs)], [*traced.in_avals]
    outputs = sorted(array.name for array in program.outputs)
    run, kept, layers = _taken_apart(
        traced,
        {i for i, name in enumerate(names) if name in stacked},
        {i for i, name in enumerate(names) if name in parameters},
    )
    constants = {}
    given = {names[i]: shapes[i] for i in kept}
    for name in given.keys() - inputs.keys():
        constants[name] = _place(name, stored[name])
    for i, layer in layers:
        constants[f'{names[i]}/{layer}'] = _place(f'{names[i]}/{layer}', stored[names[i]], layer)
        given[f'{names[i]}/{layer}'] = jax.core.ShapedArray(shapes[i].shape[1:], shapes[i].dtype)
    order = [each.name for each in program.inputs] + [name for name in given if name not in inputs]

    def in_order(*arrays: jax.Array) -> list[Any]:
        by_name = dict(zip(order, arrays, strict=True))
        values = [by_name[names[i]] for i in kept] + [by_name[f'{names[i]}/{layer}'] for i, layer in layers]
        made = dict(zip(outputs, run(*values), strict=True))
        return [made[array.name] for array in program.outputs]

    with without_logs():
        model: Any = jax2onnx.to_onnx(
            in_order,
            [jax.ShapeDtypeStruct(given[name].shape, given[name].dtype) for name in order],
            model_name=program.name,
            opset=_OPSET,
            input_names=order,
            output_names=[array.name for array in program.outputs],
            return_mode='ir',
        )
        graph = model.graph
        for value in [each for each in graph.inputs if each.name in constants]:
            graph.inputs.remove(value)
            value.const_value = constants[value.name]
            graph.register_initializer(value)
        onnx_ir.save(model, path)


def _place(name: str, tensor: StoredTensor, layer: int | None = None) -> Any:
    """Where a parameter, or one layer of it, is in the file, as graphs say it."""
    import onnx_ir

    shape = tensor.shape if layer is None else tensor.shape[1:]
    length = math.prod(shape) * tensor.dtype.itemsize
    return onnx_ir.ExternalTensor(
        tensor.file.name,
        tensor.start + (layer or 0) * length,
        length,
        onnx_ir.DataType.from_numpy(tensor.dtype),
        shape=onnx_ir.Shape(shape),
        name=name,
        base_dir=tensor.file.parent,
    )


def _taken_apart(
    closed: Any, stacked: Collection[int], parameters: Collection[int]
) -> tuple[Callable[..., list[Any]], list[int], list[_Layer]]:
    """A traced function that is given layers in place of the stacks that it only takes them out of.

    Args:
        stacked: those of its arguments that are stacks. parameters: those that go where nobody reads them.

    Returns:
        The function, which arguments it still has, and which layers follow those: (argument, layer).
    """
    jaxpr = closed.jaxpr
    stacks = {jaxpr.invars[i]: i for i in stacked}
    slices: dict[Any, _Layer] = {}
    layers: dict[Any, _Layer] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'slice' and (found := _layer_of(equation, stacks)) is not None:
            slices[equation.outvars[0]] = found
        if equation.primitive.name == 'squeeze' and equation.invars[0] in slices:
            layers[equation.outvars[0]] = slices[equation.invars[0]]
    # What nobody reads goes, the sums of routers among it; and the slices that layers were taken out of.
    read = {id(each) for each in jaxpr.outvars}
    equations = []
    for equation in reversed(jaxpr.eqns):
        if equation.outvars[0] not in layers and any(id(each) in read for each in equation.outvars):
            equations.append(equation)
            read |= {id(each) for each in equation.invars}
    kept = [i for i, each in enumerate(jaxpr.invars) if i not in parameters or id(each) in read]
    layers = {each: layer for each, layer in layers.items() if id(each) in read}
    rewritten = jaxpr.replace(
        invars=[*(jaxpr.invars[i] for i in kept), *layers],
        eqns=equations[::-1],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    run = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(rewritten, closed.consts))
    return run, kept, list(layers.values())


def _layer_of(equation: Any, stacks: Mapping[Any, int]) -> _Layer | None:
    """The (argument, layer) that a slice is, if it is one."""
    source, parameters = equation.invars[0], equation.params
    start, stop, shape = parameters['start_indices'], parameters['limit_indices'], source.aval.shape
    one = stop[0] == start[0] + 1 and parameters['strides'] is None
    if one and source in stacks and not any(start[1:]) and tuple(stop[1:]) == tuple(shape[1:]):
        return stacks[source], start[0]
    return None
