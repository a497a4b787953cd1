"""The forward and backward pass of a function in parts that can run at different times.

The program of both is traced once, and its equations are divided by what they depend on and by what depends on them. So
any layer can be split, without a word about it in the layer, and any policy of jax.checkpoint says what is kept.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

# Calls that only name a part of the program; their equations are divided too. jax.checkpoint's are not: what is in
# there is cheap (norms, activations), and its operands would be many.
_INLINED = ('jit', 'pjit', 'closed_call', 'core_call')

Arrays = list[jax.Array]
# (parameters, x, context) -> (y, losses, sums): what goes on, scalars that add to the loss as they are, and arrays that
# only add up. Trees, of which the last two may be empty.
Function = Callable[[Any, jax.Array, Any], tuple[Any, Any, Any]]


@dataclasses.dataclass(frozen=True)
class SplitBackward:
    """The parts; flat lists of arrays are what one part leaves for the next.

    Attributes:
        forward: (parameters, x, context) -> (y, sums, kept).
        whole: (parameters, kept, context, dy) -> (parameter gradients, dx).
        recompute: (parameters, kept, context) -> residuals.
        input_gradient: (parameters, residuals, context, dy) -> (dx, operands).
        recompute_input_gradient: (parameters, kept, context, dy) -> (dx, operands).
        weight_gradient: (parameters, operands, context) -> parameter gradients.
        kept, residuals, operands: shapes and types of the lists. None has anything that follows from parameters and
            context alone: that is computed again. The first that is kept is x.
    """

    forward: Callable[..., tuple[Any, Any, Arrays]]
    whole: Callable[..., tuple[Any, jax.Array]]
    recompute: Callable[..., Arrays]
    input_gradient: Callable[..., tuple[jax.Array, Arrays]]
    recompute_input_gradient: Callable[..., tuple[jax.Array, Arrays]]
    weight_gradient: Callable[..., Any]
    kept: list[jax.ShapeDtypeStruct]
    residuals: list[jax.ShapeDtypeStruct]
    operands: list[jax.ShapeDtypeStruct]


def split_backward(
    function: Function, parameters: Any, x: Any, context: Any, remat: Callable[[Function], Function] | None = None
) -> SplitBackward:
    """Split the backward pass of `function(parameters, x, context) -> (y, losses, sums)`.

    Gradients are those of y, given dy, and of the sum of the losses.

    Args:
        parameters, context: trees of arrays, x: an array; or of jax.ShapeDtypeStruct: values are not used.
        remat: jax.checkpoint with a policy, which says what the forward pass keeps; None keeps what the backward pass
            reads, so that nothing but what `function` itself wraps in jax.checkpoint is computed again.
    """
    p_leaves, p_tree = jax.tree.flatten(parameters)
    c_leaves, c_tree = jax.tree.flatten(context)
    wrapped = function if remat is None else remat(function)

    def flat(*arguments: jax.Array) -> Arrays:
        leaves, (x, *dy), c_leaves = _three(arguments, len(p_leaves), 1 + len(some_y))
        p, c = jax.tree.unflatten(p_tree, leaves), jax.tree.unflatten(c_tree, c_leaves)

        def apart(p: Any, x: jax.Array) -> tuple[Any, Any]:
            y, losses, sums = wrapped(p, x, c)
            return (y, losses), sums

        (y, losses), vjp, sums = jax.vjp(apart, p, x, has_aux=True)
        gradients, dx = vjp((jax.tree.unflatten(y_tree, dy), jax.tree.map(jnp.ones_like, losses)))
        return [*jax.tree.leaves(y), *jax.tree.leaves(sums), *jax.tree.leaves(gradients), dx]

    found_y, _, found_sums = jax.eval_shape(wrapped, parameters, x, context)
    (some_y, y_tree), (some_sums, sums_tree) = jax.tree.flatten(found_y), jax.tree.flatten(found_sums)
    example = (*p_leaves, x, *some_y, *c_leaves)
    count = len(some_y) + len(some_sums)
    both_ways = _inline(jax.make_jaxpr(flat)(*example), example)
    jaxpr = both_ways.jaxpr
    p_vars, (x_var, *dy_vars), c_vars = _three(jaxpr.invars, len(p_leaves), 1 + len(some_y))
    result_vars, gradient_vars = jaxpr.outvars[:count], jaxpr.outvars[count:]
    after_x, after_dy = _dependents(jaxpr.eqns, [x_var]), _dependents(jaxpr.eqns, dy_vars)
    wanted = _reads([e for e in jaxpr.eqns if set(e.outvars) & after_dy], gradient_vars)
    made = [v for e in jaxpr.eqns for v in e.outvars if v in after_x and v not in after_dy]
    kept = [x_var, *(v for v in made if v in wanted)]
    forward = _part(both_ways, jaxpr.eqns, [*p_vars, x_var, *c_vars], [*result_vars, *kept[1:]])

    # The same for the backward pass alone, and what it computes again.
    inputs = [*p_vars, *kept, *dy_vars, *c_vars]
    example = tuple(_struct(v) for v in inputs)
    backward = jax.make_jaxpr(_part(both_ways, jaxpr.eqns, inputs, gradient_vars))(*example)
    program = _inline(backward, example, open_remat=remat is not None)
    jaxpr = program.jaxpr
    p_vars, kept_and_dy, c_vars = _three(jaxpr.invars, len(p_leaves), len(kept) + len(some_y))
    kept, dy_vars = kept_and_dy[: len(kept)], kept_and_dy[len(kept) :]
    *weight_vars, dx_var = jaxpr.outvars
    everywhere = [*jaxpr.constvars, *p_vars, *c_vars]

    # What depends on what is kept only is recomputed; of what depends on dy, dx needs some, and the rest can wait.
    after_x, after_dy = _dependents(jaxpr.eqns, kept), _dependents(jaxpr.eqns, dy_vars)
    for_dx = _ancestors(jaxpr.eqns, [dx_var], everywhere)
    waiting = [e for e in jaxpr.eqns if set(e.outvars) & after_dy and not set(e.outvars) & for_dx]
    first = [e for e in jaxpr.eqns if e not in waiting]
    again = [e for e in first if not set(e.outvars) & after_dy]

    made = [*kept, *dy_vars, *(v for e in first for v in e.outvars if v in after_x or v in after_dy)]
    wanted = _reads(waiting, weight_vars)
    operands = [v for v in made if v in wanted]
    wanted = _reads([e for e in first if set(e.outvars) & after_dy], [dx_var, *operands])
    residuals = [v for v in [*kept, *(v for e in again for v in e.outvars if v in after_x)] if v in wanted]

    whole = _part(program, jaxpr.eqns, jaxpr.invars, jaxpr.outvars)
    recompute = _part(program, again, [*p_vars, *kept, *c_vars], residuals)
    input_gradient = _part(program, first, [*p_vars, *residuals, *dy_vars, *c_vars], [dx_var, *operands])
    both = _part(program, first, jaxpr.invars, [dx_var, *operands])
    weight_gradient = _part(program, jaxpr.eqns, [*p_vars, *operands, *c_vars], weight_vars)
    leaves = jax.tree.leaves

    def forward_and_kept(p: Any, x: jax.Array, c: Any) -> tuple[Any, Any, Arrays]:
        y, sums, others = _three(forward(*leaves(p), x, *leaves(c)), len(some_y), len(some_sums))
        return jax.tree.unflatten(y_tree, y), jax.tree.unflatten(sums_tree, sums), [x, *others]

    def gradients(p: Any, k: Arrays, c: Any, dy: Any) -> tuple[Any, jax.Array]:
        *found, dx = whole(*leaves(p), *k, *leaves(dy), *leaves(c))
        return jax.tree.unflatten(p_tree, found), dx

    def first_and_rest(arrays: Arrays) -> tuple[jax.Array, Arrays]:
        return arrays[0], list(arrays[1:])

    return SplitBackward(
        forward=forward_and_kept,
        whole=gradients,
        recompute=lambda p, k, c: recompute(*leaves(p), *k, *leaves(c)),
        input_gradient=lambda p, r, c, dy: first_and_rest(input_gradient(*leaves(p), *r, *leaves(dy), *leaves(c))),
        recompute_input_gradient=lambda p, k, c, dy: first_and_rest(both(*leaves(p), *k, *leaves(dy), *leaves(c))),
        weight_gradient=lambda p, o, c: jax.tree.unflatten(p_tree, weight_gradient(*leaves(p), *o, *leaves(c))),
        kept=[_struct(v) for v in kept],
        residuals=[_struct(v) for v in residuals],
        operands=[_struct(v) for v in operands],
    )


def _struct(variable: Var) -> jax.ShapeDtypeStruct:
    aval: Any = variable.aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _three(items: Sequence[Any], first: int, second: int) -> tuple[list[Any], list[Any], list[Any]]:
    return list(items[:first]), list(items[first : first + second]), list(items[first + second :])


def _part(
    program: ClosedJaxpr, eqns: Sequence[JaxprEqn], inputs: Sequence[Var], outputs: Sequence[Any]
) -> Callable[..., Arrays]:
    # Equations whose results are inputs of this part are left out with all that only they need.
    live = _live(eqns, outputs, inputs)
    jaxpr = program.jaxpr.replace(invars=list(inputs), outvars=list(outputs), eqns=live)
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, program.consts))


def _inline(closed: ClosedJaxpr, example: Sequence[Any], *, open_remat: bool = False) -> ClosedJaxpr:
    """The same program without calls, names and, if `open_remat`, the outer jax.checkpoint in a backward pass."""

    def run(jaxpr: Jaxpr, consts: Sequence[Any], *arguments: Any) -> list[Any]:
        values: dict[Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            if equation.primitive.name in _INLINED:
                inner: Any = equation.params.get('jaxpr', equation.params.get('call_jaxpr'))
                outputs = run(getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ()), *inputs)
            elif equation.primitive.name == 'name':  # of jax.checkpoint's policies, which have been applied
                outputs = inputs
            elif open_remat and jaxpr is closed.jaxpr and equation.params.get('differentiated'):
                outputs = run(equation.params['jaxpr'], (), *inputs)
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
