"""The analytic model of a step's work on one device: FLOPs, bytes to and from HBM, and bytes on the links by mesh axis.

Where a program was compiled, its own collectives take the place of these; they rank what has not been compiled, and
speak for machines that nothing compiles for here. What each mesh axis moves is one function of a table.
"""

import dataclasses
import math
from collections.abc import Callable

from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.layer import AttendingConfig
from llm.models.model import layers_of
from llm.models.moe import MoeConfig
from llm.models.parameters import Role, named_specs
from llm.parallel.sharding import names
from llm.scaling.accounting import TokenFlops, flops_per_token
from llm.scaling.planner.abstract import Placement, model_specs, state_bytes
from llm.scaling.planner.layer_costs import LayerCosts, layer_costs
from llm.scaling.planner.memory import estimate_memory
from llm.scaling.planner.pipelines import ways_of_rows
from llm.scaling.planner.run_config import RunConfig
from llm.scaling.planner.stacks import PlannedStack, outputs_of, remat_of, stacks_of
from llm.scaling.program import Traffic
from llm.scaling.program.collectives import RING_FACTORS


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step.

    Attributes:
        model, model_causal: of the model on all devices, in both conventions for attention (see TokenFlops).
        hardware: on one device, with what is computed again, and without blocks that a kernel skips.
        recomputed: the part of `hardware` that is computed again.
    """

    model: float
    model_causal: float
    hardware: float
    recomputed: float


def step_flops(run: RunConfig, sizes: dict[str, int], platform: str) -> StepFlops:
    """FLOPs of one step on a mesh with axes of these sizes."""
    placement = Placement.of(sizes, run.rules)
    model, row = run.model, run.row
    per_token: TokenFlops = flops_per_token(model, model_specs(model), row)
    rows = rows_per_device(run, placement)
    share = 1 / sizes['pipeline']
    layers = recomputed = 0.0
    for stack, costs in _stacks(run, placement, platform):
        tokens = rows * stack.tokens
        layers += tokens * sum(cost.forward_flops() + cost.backward_flops() for cost in costs)
        recomputed += tokens * sum(cost.recomputed_flops(stack.config) for cost in costs)
        if sizes['pipeline'] > 1:
            recomputed += tokens * sum(cost.forward_flops() for cost in costs[: stack.before])
    return StepFlops(
        model=run.tokens_per_step * per_token.training(causal=False),
        model_causal=run.tokens_per_step * per_token.training(causal=True),
        hardware=share * (layers + recomputed) + 3 * rows * _head_flops(run, placement),
        recomputed=share * recomputed,
    )


def _head_flops(run: RunConfig, placement: Placement) -> float:
    """Forward, per row on one device: logits of the tokens that have some, and what else stands around the layers."""
    model, row = run.model, run.row
    scored = row.read if row.predicted is None else row.predicted
    width = getattr(model, 'embedding_size', None) or model.d_model
    head = 2 * scored * width * outputs_of(model) / placement.ways('vocab')
    if isinstance(model, EncoderConfig):
        if model.head is not None and model.num_outputs is None:
            head += 2 * scored * model.d_model * width
        if model.embedding_size is not None:
            head += 2 * row.text * model.d_model * width
        return head + (2 * (model.d_model + 2) * model.d_model if row.pair else 0)
    if isinstance(model, DecoderConfig) and model.multi_token is not None:
        depths = model.multi_token.depths
        head *= 1 + depths
        if model.multi_token.kind == 'sequential':
            # In a pipeline all stages do them, each some of the rows.
            head += row.text * 2 * depths * 2 * model.d_model**2 / ways_of_rows(run, placement)
    return head


def rows_per_device(run: RunConfig, placement: Placement) -> float:
    """Rows of a step whose activations are on one device, or parts of them, all microbatches together."""
    return run.step.batch_size / placement.ways('batch') / placement.ways('sequence')


def _stacks(run: RunConfig, placement: Placement, platform: str) -> list[tuple[PlannedStack, list[LayerCosts]]]:
    """Every stack, and what its layers cost."""
    found = []
    for stack in stacks_of(run.model, run.row):
        costs = {layer: layer_costs(layer, run.model, placement, stack, platform) for layer in set(stack.layers)}
        found.append((stack, [costs[layer] for layer in stack.layers]))
    return found


def step_hbm_bytes(run: RunConfig, sizes: dict[str, int], platform: str) -> float:
    """Bytes that one device reads from and writes to HBM in a step, about.

    Every activation is written and read once in each of the forward pass, the recomputation and the two products of the
    backward pass that use it; gathered weights are written and read in each pass of each microbatch; the update reads
    and writes the train state once.
    """
    placement = Placement.of(sizes, run.rules)
    memory = estimate_memory(run, sizes, platform)
    state = state_bytes(run.model, run.optimizer, placement, platform)
    passes = 4 if any(kind not in ('none', 'dots') for kind, _ in remat_of(run.model)) else 3
    made = sum(stack.tokens * cost.all() for stack, costs in _stacks(run, placement, platform) for cost in costs)
    activations = 2 * passes * rows_per_device(run, placement) * made
    weights = sum(_whole(run, placement, spec) for _, spec in named_specs(model_specs(run.model)))
    moved = 2 * passes * weights * run.step.gradient_accumulation
    logits = 2 * memory.logits * run.step.gradient_accumulation
    update = 2 * (state.parameters + state.optimizer) + 2 * state.gradients * run.step.gradient_accumulation
    return (activations / sizes['pipeline']) + moved + logits + update


def step_host_bytes(run: RunConfig, sizes: dict[str, int], platform: str) -> float:
    """Bytes that one device sends to the host and takes back in a step: activations that wait there, twice."""
    placement = Placement.of(sizes, run.rules)
    layers = sum(
        stack.tokens * cost.offloaded(stack.config)
        for stack, costs in _stacks(run, placement, platform)
        for cost in costs
    )
    return 2 * rows_per_device(run, placement) * layers / sizes['pipeline']


def _compute_bytes(run: RunConfig) -> int:
    return {'float32': 4, 'float64': 8}.get(run.model.compute_dtype, 2)


def _whole(run: RunConfig, placement: Placement, spec: object) -> float:
    """Bytes of a parameter on one device in the compute type when it is gathered; all layers that the device runs."""
    stored = placement.rules.place(spec.axes, spec.shape, placement.mesh)  # type: ignore[attr-defined]
    used = placement.rules.partition(spec.axes, placement.mesh, parameters=False)  # type: ignore[attr-defined]
    total = float(_compute_bytes(run))
    for axis, length, here, there in zip(spec.axes, spec.shape, stored, used, strict=True):  # type: ignore[attr-defined]
        own = [name for name in names(here) if name in names(there) or axis in ('layers', 'experts')]
        total *= length / math.prod(placement.mesh.shape[name] for name in own)
    return total


def _traffic(kind: str, axes: tuple[str, ...], ways: int, payload: float, executions: float, beside: bool) -> Traffic:
    link_bytes = payload * RING_FACTORS[kind](ways)
    return Traffic(kind, axes, False, round(executions), payload, link_bytes, link_bytes if beside else 0.0)


def _gathered_weights(run: RunConfig, placement: Placement, platform: str) -> list[Traffic]:
    """Weights over the axes that split them and no activation: gathered forward and backward, gradients scattered.

    Those of layers before a pipeline's stages are gathered for each of their forward passes, of which there are two.
    """
    by_axes: dict[tuple[str, ...], float] = {}
    again: dict[tuple[str, ...], float] = {}
    before = {stack.group or 'leading' for stack in stacks_of(run.model, run.row) if stack.before}
    for name, spec in named_specs(model_specs(run.model)):
        stored = placement.rules.place(spec.axes, spec.shape, placement.mesh)
        used = placement.rules.partition(spec.axes, placement.mesh, parameters=False)
        moved = tuple(
            name
            for axis, here, there in zip(spec.axes, stored, used, strict=True)
            for name in names(here)
            if name not in names(there) and axis not in ('layers', 'experts')
        )
        if moved and (spec.role is not Role.EMBEDDING or getattr(run.model, 'tied_embeddings', True)):
            by_axes[moved] = by_axes.get(moved, 0.0) + _whole(run, placement, spec)
            if placement.mesh.shape['pipeline'] > 1 and name.split('/')[0] in before:
                again[moved] = again.get(moved, 0.0) + _whole(run, placement, spec)
    times = run.step.gradient_accumulation
    rows = []
    for axes, size in by_axes.items():
        ways = math.prod(placement.mesh.shape[name] for name in axes)
        layers = len(layers_of(run.model)) * times
        gathered = 2 * size + again.get(axes, 0.0)
        rows.append(_traffic('all-gather', axes, ways, gathered * times, 2 * layers, True))
        rows.append(_traffic('reduce-scatter', axes, ways, size * times, layers, False))
    return rows


def _replicated_gradients(run: RunConfig, placement: Placement, platform: str) -> list[Traffic]:
    """Gradients summed over the axes that split the batch and not the parameter."""
    over = [name for axis in ('batch', 'sequence') for name in placement.over(axis)]
    by_axes: dict[tuple[str, ...], float] = {}
    for _, spec in named_specs(model_specs(run.model)):
        stored = placement.rules.place(spec.axes, spec.shape, placement.mesh)
        splits = {name for entry in stored for name in names(entry)}
        axes = tuple(name for name in over if name not in splits)
        if axes:
            part = math.prod(spec.shape) / math.prod(placement.mesh.shape[name] for name in splits)
            by_axes[axes] = by_axes.get(axes, 0.0) + _compute_bytes(run) * part
    times = run.step.gradient_accumulation
    return [
        _traffic('all-reduce', axes, math.prod(placement.mesh.shape[n] for n in axes), size * times, times, False)
        for axes, size in by_axes.items()
    ]


def _split_products(run: RunConfig, placement: Placement, platform: str) -> list[Traffic]:
    """Inputs and outputs of the products that `tensor` cuts, two of each a layer.

    Outputs are summed. Where the residual stream is cut along the same axis they are summed into parts of it, and the
    parts are gathered before the next product: a sum of both takes the bytes of one all-reduce.
    """
    axes = placement.over('heads') or placement.over('mlp')
    if not axes:
        return []
    ways = math.prod(placement.mesh.shape[name] for name in axes)
    row_bytes = rows_per_device(run, placement) * run.model.d_model * _compute_bytes(run)
    microbatches = run.step.gradient_accumulation

    def row(kind: str, times: float, tokens: float) -> Traffic:
        return _traffic(kind, axes, ways, tokens * row_bytes, times * microbatches, False)

    # The embedding's and the head's.
    sums, gathers, summed, gathered = 2.0, 2.0, 2.0 * run.row.text, 2.0 * run.row.text
    for stack in stacks_of(run.model, run.row):
        branches = sum(1 + (layer.feed_forward is not None) + (layer.cross is not None) for layer in stack.layers)
        branches /= placement.mesh.shape['pipeline']
        kept = stack.config.remat in ('none', 'dots', 'dots_no_batch')
        # Forward and backward; the last product of a layer is not computed again.
        again, anew = branches * (2 if kept else 2.5), branches * (2 if kept else 3)
        sums, summed = sums + again, summed + again * stack.tokens
        gathers, gathered = gathers + anew, gathered + anew * stack.tokens
    if not set(axes) <= set(placement.over('residual')):
        return [row('all-reduce', sums, summed)]
    return [row('reduce-scatter', sums, summed), row('all-gather', gathers, gathered)]


def _split_sequences(run: RunConfig, placement: Placement, platform: str) -> list[Traffic]:
    """What attention needs of the tokens of other devices, by the method of the rules."""
    axes = placement.over('sequence')
    if not axes:
        return []
    ways = math.prod(placement.mesh.shape[name] for name in axes)
    rows = run.step.batch_size / placement.ways('batch')  # whole ones
    size = rows * _compute_bytes(run) / placement.mesh.shape['pipeline']
    found: list[Traffic] = []
    for stack in stacks_of(run.model, run.row):
        # (attention, tokens that have keys)
        layers = [(layer.mixer, stack.tokens) for layer in stack.layers if isinstance(layer.mixer, AttendingConfig)]
        crossing = [(layer.cross, stack.memory) for layer in stack.layers if layer.cross is not None]
        keys = sum(2 * each.num_kv_heads * each.head_dim * tokens for each, tokens in (*layers, *crossing))
        queries = sum(2 * each.num_heads * each.head_dim for each, _ in (*layers, *crossing)) * stack.tokens
        of_keys, of_queries = keys / placement.ways('kv_heads'), queries / placement.ways('heads')
        config = stack.config
        kept = 'attention' in config.remat_names or config.remat in ('none', 'dots')
        forward = 1 if kept else 2  # and once more where attention is computed again
        times = forward * len(layers) * run.step.gradient_accumulation
        # Keys, values and, backward, their gradients go round; or heads change places with tokens, of queries and
        # outputs too; or keys and values are gathered and their gradients scattered.
        if run.rules.sequence_method == 'ring':
            payloads = {'collective-permute': (forward + 2) * of_keys * (ways - 1) / ways}
        elif run.rules.sequence_method == 'ulysses':
            payloads = {'all-to-all': (forward + 1) * (of_keys + of_queries) / ways}
        else:
            payloads = {'all-gather': (forward + 1) * of_keys, 'reduce-scatter': of_keys}
        found += [_traffic(kind, axes, ways, payload * size, times, True) for kind, payload in payloads.items()]
    return found


def _tokens_to_experts(run: RunConfig, placement: Placement, platform: str) -> list[Traffic]:
    """Tokens to the devices that have their experts and back: forward, once more where computed again, and backward."""
    stored = placement.rules.partition(('experts',), placement.mesh, parameters=True)[0]
    axes = tuple(name for name in names(stored) if name in placement.over('batch'))
    if not axes:
        return []
    ways = math.prod(placement.mesh.shape[name] for name in axes)
    payload = rounds = 0.0
    for stack in stacks_of(run.model, run.row):
        networks = [layer.feed_forward for layer in stack.layers if isinstance(layer.feed_forward, MoeConfig)]
        passes = 2 if stack.config.remat == 'none' else 3
        # The fullest pair of devices has more than its share, and the last round is not full: half as much again.
        payload += sum(2 * passes * 1.5 * each.experts_per_token for each in networks) * stack.tokens
        rounds += sum(2 * passes * 1.5 / each.exchange_share for each in networks)
    if not payload:
        return []
    row_bytes = rows_per_device(run, placement) * run.model.d_model * _compute_bytes(run)
    payload *= row_bytes / placement.mesh.shape['pipeline']
    return [_traffic('all-to-all', axes, ways, payload, rounds * run.step.gradient_accumulation, False)]


def _stages(run: RunConfig, placement: Placement, platform: str) -> list[Traffic]:
    """Activations from stage to stage, an encoder's output beside them, and their gradients back."""
    stages = placement.mesh.shape['pipeline']
    if stages == 1:
        return []
    last = stacks_of(run.model, run.row)[-1]
    tokens = rows_per_device(run, placement) * (last.tokens + last.memory)
    payload = 2 * tokens * run.model.d_model * _compute_bytes(run)
    return [_traffic('collective-permute', ('pipeline',), stages, payload, 2 * run.step.gradient_accumulation, True)]


# What moves and why, one row each. A new mesh axis brings a row.
MOVES: dict[str, Callable[[RunConfig, Placement, str], list[Traffic]]] = {
    'sharded weights': _gathered_weights,
    'gradients of replicated weights': _replicated_gradients,
    'outputs of split products': _split_products,
    'keys and values of split sequences': _split_sequences,
    'tokens to their experts': _tokens_to_experts,
    'activations between stages': _stages,
}


def step_traffic(run: RunConfig, sizes: dict[str, int], platform: str) -> tuple[Traffic, ...]:
    """What one device sends in a step, by the reasons in MOVES; whether it leaves a slice is not told."""
    placement = Placement.of(sizes, run.rules)
    found = [row for rows in MOVES.values() for row in rows(run, placement, platform)]
    return tuple(sorted((row for row in found if row.link_bytes), key=lambda row: -row.link_bytes))
