"""The backward pass of a function in parts that can run at different times.

The program of the whole backward pass is traced once, and its equations are divided by what they depend on and by what
depends on them. So any layer can be split, without a word about it in the layer.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

# Calls that only name a part of the program; their equations are divided too. jax.checkpoint's are not: what is in
# there is cheap (norms, activations), and its operands would be many.
_INLINED = ('jit', 'pjit', 'closed_call', 'core_call')

Arrays = list[jax.Array]
Function = Callable[[Any, jax.Array, Any], jax.Array]  # (parameters, x, context) -> y


@dataclasses.dataclass(frozen=True)
class SplitBackward:
    """The parts; flat lists of arrays are what one part leaves for the next.

    Attributes:
        whole: (parameters, x, context, dy) -> (parameter gradients, dx).
        recompute: (parameters, x, context) -> residuals.
        input_gradient: (parameters, residuals, context, dy) -> (dx, operands).
        recompute_input_gradient: (parameters, x, context, dy) -> (dx, operands).
        weight_gradient: (parameters, operands, context) -> parameter gradients.
        residuals, operands: shapes and types of the lists. Neither has anything that follows from parameters and
            context alone: that is computed again.
    """

    whole: Callable[..., tuple[Any, jax.Array]]
    recompute: Callable[..., Arrays]
    input_gradient: Callable[..., tuple[jax.Array, Arrays]]
    recompute_input_gradient: Callable[..., tuple[jax.Array, Arrays]]
    weight_gradient: Callable[..., Any]
    residuals: list[jax.ShapeDtypeStruct]
    operands: list[jax.ShapeDtypeStruct]


def split_backward(function: Function, parameters: Any, x: Any, context: Any) -> SplitBackward:
    """Split the backward pass of `function(parameters, x, context) -> y`, y of the shape and type of x.

    Args:
        parameters, context: trees of arrays, x: an array; or of jax.ShapeDtypeStruct: values are not used.
    """

    def whole(parameters: Any, x: jax.Array, context: Any, dy: jax.Array) -> tuple[Any, jax.Array]:
        _, vjp = jax.vjp(lambda parameters, x: function(parameters, x, context), parameters, x)
        return vjp(dy)

    p_leaves, p_tree = jax.tree.flatten(parameters)
    c_leaves, c_tree = jax.tree.flatten(context)

    def flat(*arguments: jax.Array) -> Arrays:
        p, (x, dy), c = arguments[: len(p_leaves)], arguments[len(p_leaves) :][:2], arguments[len(p_leaves) + 2 :]
        gradients, dx = whole(jax.tree.unflatten(p_tree, p), x, jax.tree.unflatten(c_tree, c), dy)
        return [*jax.tree.leaves(gradients), dx]

    example = (*p_leaves, x, x, *c_leaves)
    program = _inline(jax.make_jaxpr(flat)(*example), example)
    jaxpr = program.jaxpr
    p_vars, (x_var, dy_var), c_vars = _three(jaxpr.invars, len(p_leaves))
    *weight_vars, dx_var = jaxpr.outvars
    everywhere = [*jaxpr.constvars, *p_vars, *c_vars]

    # What depends on x only is recomputed; of what depends on dy, dx needs some, and the rest can wait.
    after_x, after_dy = _dependents(jaxpr.eqns, [x_var]), _dependents(jaxpr.eqns, [dy_var])
    for_dx = _ancestors(jaxpr.eqns, [dx_var], everywhere)
    waiting = [e for e in jaxpr.eqns if set(e.outvars) & after_dy and not set(e.outvars) & for_dx]
    first = [e for e in jaxpr.eqns if e not in waiting]
    forward = [e for e in first if not set(e.outvars) & after_dy]

    made = [x_var, dy_var, *(v for e in first for v in e.outvars if v in after_x or v in after_dy)]
    wanted = _reads(waiting, weight_vars)
    operands = [v for v in made if v in wanted]
    wanted = _reads([e for e in first if set(e.outvars) & after_dy], [dx_var, *operands])
    residuals = [v for v in [x_var, *(v for e in forward for v in e.outvars if v in after_x)] if v in wanted]

    def part(eqns: Sequence[JaxprEqn], inputs: Sequence[Var], outputs: Sequence[Any]) -> Callable[..., Arrays]:
        # Equations whose results are inputs of this part are left out with all that only they need.
        kept = _live(eqns, outputs, inputs)
        closed = ClosedJaxpr(jaxpr.replace(invars=list(inputs), outvars=list(outputs), eqns=kept), program.consts)
        return jaxpr_as_fun(closed)

    everything = list(jaxpr.eqns)
    recompute = part(forward, [*p_vars, x_var, *c_vars], residuals)
    input_gradient = part(first, [*p_vars, *residuals, dy_var, *c_vars], [dx_var, *operands])
    both = part(first, [*p_vars, x_var, dy_var, *c_vars], [dx_var, *operands])
    weight_gradient = part(everything, [*p_vars, *operands, *c_vars], weight_vars)
    leaves = jax.tree.leaves

    def first_and_rest(arrays: Arrays) -> tuple[jax.Array, Arrays]:
        return arrays[0], list(arrays[1:])

    return SplitBackward(
        whole=whole,
        recompute=lambda p, x, c: recompute(*leaves(p), x, *leaves(c)),
        input_gradient=lambda p, r, c, dy: first_and_rest(input_gradient(*leaves(p), *r, dy, *leaves(c))),
        recompute_input_gradient=lambda p, x, c, dy: first_and_rest(both(*leaves(p), x, dy, *leaves(c))),
        weight_gradient=lambda p, o, c: jax.tree.unflatten(p_tree, weight_gradient(*leaves(p), *o, *leaves(c))),
        residuals=[_struct(v) for v in residuals],
        operands=[_struct(v) for v in operands],
    )


def _struct(variable: Var) -> jax.ShapeDtypeStruct:
    aval: Any = variable.aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _three(variables: Sequence[Var], parameters: int) -> tuple[list[Var], list[Var], list[Var]]:
    return (
        list(variables[:parameters]),
        list(variables[parameters : parameters + 2]),
        list(variables[parameters + 2 :]),
    )


def _inline(closed: ClosedJaxpr, example: Sequence[Any]) -> ClosedJaxpr:
    """The same program without calls."""

    def run(jaxpr: Jaxpr, consts: Sequence[Any], *arguments: Any) -> list[Any]:
        values: dict[Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            if equation.primitive.name in _INLINED:
                inner = equation.params['jaxpr']
                outputs = run(inner.jaxpr, inner.consts, *inputs)
            else:
                variables = [atom for atom in equation.invars if not isinstance(atom, Literal)]
                single = jaxpr.replace(constvars=[], invars=variables, outvars=equation.outvars, eqns=[equation])
                outputs = jaxpr_as_fun(ClosedJaxpr(single, ()))(
                    *(value for value, v in zip(inputs, equation.invars, strict=True) if not isinstance(v, Literal))
                )
            values |= dict(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    return jax.make_jaxpr(lambda *arguments: run(closed.jaxpr, closed.consts, *arguments))(*example)


def _variables(atoms: Iterable[Any]) -> list[Var]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _dependents(eqns: Sequence[JaxprEqn], roots: Sequence[Var]) -> set[Var]:
    found = set(roots)
    for equation in eqns:
        if found.intersection(_variables(equation.invars)):
            found.update(equation.outvars)
    return found


def _ancestors(eqns: Sequence[JaxprEqn], outputs: Sequence[Any], given: Sequence[Var]) -> set[Var]:
    found = set(_variables(outputs))
    for equation in reversed(eqns):
        if found.intersection(equation.outvars):
            found.update(_variables(equation.invars))
    return found - set(given)


def _reads(eqns: Sequence[JaxprEqn], outputs: Sequence[Any]) -> set[Var]:
    return {v for e in eqns for v in _variables(e.invars)} | set(_variables(outputs))


def _live(eqns: Sequence[JaxprEqn], outputs: Sequence[Any], inputs: Sequence[Var]) -> list[JaxprEqn]:
    needed, given, kept = set(_variables(outputs)), set(inputs), []
    for equation in reversed(eqns):
        if needed.intersection(equation.outvars) - given:
            kept.append(equation)
            needed.update(_variables(equation.invars))
    return kept[::-1]
