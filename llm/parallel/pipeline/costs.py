"""What the parts of a repeat of the layers cost, in FLOPs of matrix products, read off their programs."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params

from llm.parallel.pipeline.granularity import Costs
from llm.parallel.pipeline.split import Function, split_backward

Remat = Callable[[Function], Function] | None


def repeat_costs(
    function: Function, parameters: Any, x: jax.ShapeDtypeStruct, context: Any, remat: Remat = None
) -> Costs:
    """Costs of the forward pass of `function(parameters, x, context)` and of the parts of its backward pass.

    Args:
        parameters, context: trees of jax.ShapeDtypeStruct. remat: see split_backward.
    """
    split = split_backward(function, parameters, x, context, remat)
    recompute = product_flops(split.recompute, parameters, split.kept, context)
    both = product_flops(split.recompute_input_gradient, parameters, split.kept, context, x)
    return Costs(
        forward=product_flops(function, parameters, x, context),
        recompute=recompute,
        input_gradient=both - recompute,
        weight_gradient=product_flops(split.weight_gradient, parameters, split.operands, context),
    )


def compiled_costs(
    function: Function, parameters: Any, x: jax.ShapeDtypeStruct, context: Any, remat: Remat = None
) -> Costs:
    """The same as `repeat_costs`, by the compiler's own count of its optimized programs.

    It counts elementwise operations too, and a loop's body once: for functions without loops. It takes seconds.
    """
    split = split_backward(function, parameters, x, context, remat)

    def flops(part: Any, *arguments: Any) -> float:
        analysis: Any = jax.jit(part).lower(*arguments).compile().cost_analysis()
        return float(analysis['flops'])

    recompute = flops(split.recompute, parameters, split.kept, context)
    return Costs(
        forward=flops(function, parameters, x, context),
        recompute=recompute,
        input_gradient=flops(split.recompute_input_gradient, parameters, split.kept, context, x) - recompute,
        weight_gradient=flops(split.weight_gradient, parameters, split.operands, context),
    )


def product_flops(function: Any, *arguments: Any) -> float:
    """FLOPs of the matrix products of `function`, loops multiplied out; arguments are trees of jax.ShapeDtypeStruct.

    A loop of unknown length counts once, and of a branch the dearest. Kernels count by their own estimate, or as their
    body times the grid.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = [_flops(getattr(each, 'jaxpr', each)) for each in jaxprs_in_params(params)]
        if name == 'dot_general':
            (contracted, _), _ = params['dimension_numbers']
            left: Any = equation.invars[0].aval
            result: Any = equation.outvars[0].aval
            total += 2 * math.prod(left.shape[i] for i in contracted) * math.prod(result.shape)
        elif name == 'pallas_call':
            estimate = params.get('cost_estimate')
            total += sum(inner) * math.prod(params['grid_mapping'].grid) if estimate is None else estimate.flops
        elif name == 'scan':
            total += sum(inner) * params['length']
        elif name == 'cond':
            total += max(inner)
        else:
            total += sum(inner)
    return total
