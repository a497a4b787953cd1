"""The analytic memory model: bytes on one device at the peak of a training step, by what they are.

A step has three phases, and the peak is the largest: the loss, when a chunk of logits is there; the backward pass, when
gradients, kept activations and one layer's recomputed ones are; and the update. What the model leaves out (padding of
small arrays, fragmentation) `tools/planner_memory_error.py` measures against the compiler.
"""

import dataclasses
import math
from typing import Any

from llm.kernels.cross_entropy.chunked import default_chunk
from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.parameters import Role, named_specs
from llm.parallel.sharding import names
from llm.scaling.planner.abstract import Placement, model_specs, remembered_bytes, state_bytes
from llm.scaling.planner.layer_costs import heads_bytes, layer_costs, surroundings_bytes
from llm.scaling.planner.pipelines import kept_bytes, ways_of_rows
from llm.scaling.planner.run_config import RunConfig
from llm.scaling.planner.stacks import PlannedStack, outputs_of, stacks_of

# How often an array is there at once, near the compiler's figures for the runs of tools/planner_memory_error.py. Of the
# layer at work: its activations, and a part of their gradients. Of its gathered weights: some of the next layer's on
# their way, or gradients.
LAYER_AT_ONCE = 1.3
GATHERED_LAYERS = 1.6
# Part of the memory beside HBM that takes arrays of the layer at work.
ON_CHIP_SHARE = 0.7
# Bytes of an element of a chunk's logits: the logits and their gradient, both in fp32.
BYTES_OF_LOGITS = 8.0
# Muon's matrices at work, whole and in fp32: one going in, one coming out.
WHOLE_MATRICES = 2.0
# Layers whose activations are on their way to the host, or back.
OFFLOADED_LAYERS = 2.0
# A step's program on a TPU, whatever the model's size: the layers are a loop.
CODE_BYTES = 40e6


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device.

    Attributes:
        parameters, optimizer, batch, remembered: arguments of the step, the last what layers remember of the rows
            before. gradients: in fp32, and their sum over microbatches.
        weights: copies of this device's part in the compute type, and weights gathered for the layers at work.
        activations: kept for the backward pass. layer: of the layer at work, or of those that all stages of a
            pipeline run between two ticks. logits: of a chunk of the loss, and the gradient of the head. code: the
            program.
        peak: the most that is there at once; less than the sum of the others.
        host: activations that wait in the memory of the host, beside all this.
    """

    parameters: float
    optimizer: float
    batch: float
    remembered: float
    gradients: float
    weights: float
    activations: float
    layer: float
    logits: float
    code: float
    peak: float
    host: float

    @property
    def arguments(self) -> float:
        """Bytes of train state and batch."""
        return self.parameters + self.optimizer + self.batch + self.remembered

    @property
    def temporaries(self) -> float:
        """Bytes of everything else at the peak."""
        return self.peak - self.arguments - self.code


def estimate_memory(run: RunConfig, sizes: dict[str, int], platform: str, on_chip: float = 0.0) -> MemoryEstimate:
    """The memory of a run on a mesh with axes of these sizes.

    Args:
        on_chip: bytes beside HBM that take part of what the backward pass works on.

    Raises:
        UserError: the mesh cannot divide a parameter, or the pipeline's schedule cannot run the model.
    """
    placement = Placement.of(sizes, run.rules)
    model, step, row = run.model, run.step, run.row
    state = state_bytes(model, run.optimizer, placement, platform)
    rows = step.batch_size / placement.ways('batch')
    share = rows / placement.ways('sequence') / step.gradient_accumulation  # of a row, times rows of a microbatch
    stages = sizes['pipeline']
    saved = host = at_work = 0.0
    for stack in stacks_of(model, row):
        made = {
            layer: layer_costs(layer, model, placement, stack, platform)
            for layer in {*stack.config.pattern, *stack.layers}
        }
        costs, layers = [made[layer] for layer in stack.config.pattern], [made[layer] for layer in stack.layers]
        tokens = stack.tokens * share
        staged = layers
        if stages > 1:
            before, staged = layers[: stack.before], layers[stack.before :]
            if before:  # what they keep for their backward pass is there in between two ticks alone
                needed = sum(cost.saved(stack.config) for cost in before)
                needed += LAYER_AT_ONCE * max(cost.all() for cost in before)
                at_work = max(at_work, needed * tokens / ways_of_rows(run, placement))
            saved += kept_bytes(run, stack, costs, stages) * tokens if staged else 0.0
        else:
            waits = sum(cost.offloaded(stack.config) for cost in layers) * tokens
            saved += sum(cost.saved(stack.config) for cost in layers) * tokens
            saved += OFFLOADED_LAYERS * waits / len(layers)  # what is on its way to the host and back is here
            host += waits
        at_work = max(at_work, LAYER_AT_ONCE * max((cost.all() for cost in staged), default=0.0) * tokens)
    columns = outputs_of(model) / placement.ways('vocab')
    depths = len(model.further_layers) if isinstance(model, DecoderConfig) else 0
    saved += heads_bytes(model, placement) * row.text * share
    saved += surroundings_bytes(model, row, placement) * share
    scored = (1 + depths) * (row.read if row.predicted is None else row.predicted) * share
    logits = BYTES_OF_LOGITS * min(scored, default_chunk(math.ceil(columns), platform)) * columns
    # The loss takes its gradients along: the head's is whole until all chunks are added.
    head_gradient = 4 * (getattr(model, 'embedding_size', None) or model.d_model) * columns
    cast, gathered, head = _weights(run, placement)
    present = float(state.gradients)
    accumulated = present if step.gradient_accumulation > 1 else 0.0
    if stages > 1:  # which add each gradient to the sum as soon as they have it
        accumulated, present = present, 0.0

    always = cast + saved + accumulated
    loss = always + logits + head + head_gradient
    backward = always + present + max(0.0, at_work + gathered - ON_CHIP_SHARE * on_chip)
    update = present + accumulated + _orthogonalized(run)
    batch = 4 * sum(run.row_arrays.values()) * rows / placement.ways('sequence')
    remembered = remembered_bytes(model, step.batch_size, placement, platform)
    arguments = state.parameters + state.optimizer + batch + remembered
    code = CODE_BYTES if platform == 'tpu' else 0.0
    return MemoryEstimate(
        parameters=state.parameters,
        optimizer=state.optimizer,
        batch=batch,
        remembered=remembered,
        gradients=present + accumulated,
        weights=cast + gathered,
        activations=saved,
        layer=at_work,
        logits=logits + head_gradient,
        code=code,
        peak=arguments + max(loss, backward, update) + code,
        host=host,
    )


def _orthogonalized(run: RunConfig) -> float:
    """Bytes of the whole matrices that Muon works on: those of all layers at once, of one kind after the other."""
    if run.optimizer.kind != 'muon':
        return 0.0
    sizes = [math.prod(spec.shape) for _, spec in named_specs(model_specs(run.model)) if spec.role is Role.HIDDEN]
    return WHOLE_MATRICES * 4 * max(sizes)


def _weights(run: RunConfig, placement: Placement) -> tuple[float, float, float]:
    """Bytes of (this device's part in the compute type, the weights of a layer gathered, the head's gathered)."""
    size = {'float32': 4, 'float64': 8}.get(run.model.compute_dtype, 2)
    cast = gathered = head = 0.0
    specs = model_specs(run.model)
    stacks = stacks_of(run.model, run.row)
    in_stacks = {stack.group for stack in stacks}
    parts: list[tuple[Any, PlannedStack | None]] = [
        (specs if stack.group is None else specs[stack.group], stack) for stack in stacks
    ]
    if None not in in_stacks:
        parts.append(({name: part for name, part in specs.items() if name not in in_stacks}, None))
    untied = not isinstance(run.model, EncoderConfig) and not run.model.tied_embeddings
    for part, stack in parts:
        layers = 0.0
        for _, spec in named_specs(part):
            if spec.role in (Role.VECTOR, Role.EMBEDDING) and (untied or 'vocab' not in spec.axes):
                continue
            stored = placement.rules.place(spec.axes, spec.shape, placement.mesh)
            used = placement.rules.partition(spec.axes, placement.mesh, parameters=False)
            own_part, whole = float(size), float(size)
            for axis, length, here, there in zip(spec.axes, spec.shape, stored, used, strict=True):
                own = math.prod(placement.mesh.shape[name] for name in names(here))
                # Experts stay where they are: tokens go to them.
                kept = math.prod(placement.mesh.shape[n] for n in names(here) if n in names(there) or axis == 'experts')
                own_part *= length / own
                whole *= 1 if axis in ('layers', 'remainder', 'depths') else length / kept
            # The loop over layers casts what it needs, unless its backward pass keeps everything
            # (llm.models.layer_stack); a stage of a pipeline always, unless its layers come from others.
            at_once = stack is None or stack.config.remat == 'none' or not stack.config.scan_layers
            if placement.mesh.shape['pipeline'] > 1:
                at_once = run.pipeline.chunks > 1
            at_once = at_once or spec.role is not Role.HIDDEN
            cast += own_part if size != 4 and at_once else 0.0
            is_gathered = any(
                set(names(here)) - set(names(there)) and axis != 'experts'
                for axis, here, there in zip(spec.axes, stored, used, strict=True)
            )
            if is_gathered and spec.role is Role.HIDDEN and stack is not None:
                layers += whole
            elif is_gathered:
                head += whole
        if stack is not None:
            gathered = max(gathered, layers / len(stack.config.pattern))
    return cast, GATHERED_LAYERS * gathered, head
