"""The analytic memory model: bytes on one device at the peak of a training step, by what they are.

A step has three phases, and the peak is the largest: the loss, when a chunk of logits is there; the backward pass, when
gradients, kept activations and one layer's recomputed ones are; and the update. What the model leaves out (padding of
small arrays, fragmentation) `tools/planner_memory_error.py` measures against the compiler.
"""

import dataclasses
import math

from llm.kernels.cross_entropy.chunked import default_chunk
from llm.models.model import layers_of
from llm.models.parameters import Role, named_specs
from llm.parallel.sharding import names
from llm.scaling.planner.abstract import Placement, model_specs, state_bytes
from llm.scaling.planner.layer_costs import heads_bytes, layer_costs
from llm.scaling.planner.pipelines import kept_bytes
from llm.scaling.planner.run_config import RunConfig

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
        parameters, optimizer, batch: arguments of the step. gradients: in fp32, and their sum over microbatches.
        weights: copies of this device's part in the compute type, and weights gathered for the layers at work.
        activations: kept for the backward pass. layer: of the layer at work. logits: of a chunk of the loss, and the
            gradient of the head. code: the program.
        peak: the most that is there at once; less than the sum of the others.
        host: activations that wait in the memory of the host, beside all this.
    """

    parameters: float
    optimizer: float
    batch: float
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
        return self.parameters + self.optimizer + self.batch

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
    model, step = run.model, run.step
    state = state_bytes(model, run.optimizer, placement, platform)
    rows = step.batch_size / placement.ways('batch')
    tokens = rows * step.sequence_length / placement.ways('sequence') / step.gradient_accumulation

    made = {
        layer: layer_costs(layer, model, placement, step.sequence_length, platform)
        for layer in {*model.pattern, *layers_of(model)}
    }
    costs, layers = [made[layer] for layer in model.pattern], [made[layer] for layer in layers_of(model)]
    stages = sizes['pipeline']
    host = 0.0
    if stages > 1:
        saved = kept_bytes(run, costs, stages) * tokens
    else:
        saved = sum(cost.saved(model) for cost in layers) * tokens
        host = sum(cost.offloaded(model) for cost in layers) * tokens
    if host:  # what is on its way to the host and back is here
        saved += OFFLOADED_LAYERS * host / len(layers)
    at_work = LAYER_AT_ONCE * max(cost.all() for cost in layers) * tokens
    columns = model.vocab_size / placement.ways('vocab')
    depths = len(model.further_layers)
    saved += heads_bytes(model, placement) * tokens
    logits = BYTES_OF_LOGITS * min((1 + depths) * tokens, default_chunk(math.ceil(columns), platform)) * columns
    # The loss takes its gradients along: the head's is whole until all chunks are added.
    head_gradient = 4 * model.d_model * columns
    cast, gathered, head = _weights(run, placement)
    present = float(state.gradients)
    accumulated = present if step.gradient_accumulation > 1 else 0.0
    if stages > 1:  # which add each gradient to the sum as soon as they have it
        accumulated, present = present, 0.0

    always = cast + saved + accumulated
    loss = always + logits + head + head_gradient
    backward = always + present + max(0.0, at_work + gathered - ON_CHIP_SHARE * on_chip)
    update = present + accumulated + _orthogonalized(run)
    batch = 5 * 4 * rows * step.sequence_length / placement.ways('sequence')
    arguments = state.parameters + state.optimizer + batch
    code = CODE_BYTES if platform == 'tpu' else 0.0
    return MemoryEstimate(
        parameters=state.parameters,
        optimizer=state.optimizer,
        batch=batch,
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
    """Bytes of (this device's part in the compute type, the layers' weights gathered, the head's gathered)."""
    size = {'float32': 4, 'float64': 8}.get(run.model.compute_dtype, 2)
    cast = layers = head = 0.0
    for _, spec in named_specs(model_specs(run.model)):
        if spec.role in (Role.VECTOR, Role.EMBEDDING) and not (run.model.tied_embeddings and 'vocab' in spec.axes):
            continue
        stored = placement.rules.place(spec.axes, spec.shape, placement.mesh)
        used = placement.rules.partition(spec.axes, placement.mesh, parameters=False)
        part, whole = float(size), float(size)
        for axis, length, here, there in zip(spec.axes, spec.shape, stored, used, strict=True):
            own = math.prod(placement.mesh.shape[name] for name in names(here))
            # Experts stay where they are: tokens go to them.
            kept = math.prod(placement.mesh.shape[n] for n in names(here) if n in names(there) or axis == 'experts')
            part *= length / own
            whole *= 1 if axis in ('layers', 'remainder', 'depths') else length / kept
        # The loop over layers casts what it needs, unless its backward pass keeps everything (llm.models.layer_stack);
        # a stage of a pipeline always, unless its layers come from others.
        at_once = run.model.remat == 'none' or not run.model.scan_layers
        if placement.mesh.shape['pipeline'] > 1:
            at_once = run.pipeline.chunks > 1
        at_once = at_once or spec.role is not Role.HIDDEN
        cast += part if size != 4 and at_once else 0.0
        is_gathered = any(
            set(names(here)) - set(names(there)) and axis != 'experts'
            for axis, here, there in zip(spec.axes, stored, used, strict=True)
        )
        if spec.role is Role.HIDDEN:
            layers += whole if is_gathered else 0.0
        else:
            head += whole if is_gathered else 0.0
    return cast, GATHERED_LAYERS * layers / len(run.model.pattern), head
