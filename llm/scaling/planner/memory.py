"""The analytic memory model: bytes on one device at the peak of a training step, by what they are.

A step has three phases, and the peak is the largest: the loss, when all logits are there; the backward pass, when
gradients, kept activations and one layer's recomputed ones are; and the update. What the model leaves out (padding of
small arrays, fragmentation) `tools/planner_memory_error.py` measures against the compiler.
"""

import dataclasses
import math

from llm.models.parameters import Role, named_specs
from llm.scaling.planner.abstract import Placement, model_specs, names, state_bytes
from llm.scaling.planner.layer_costs import layer_costs
from llm.scaling.planner.run_config import RunConfig

# Of everything that the backward pass of one layer makes, and of its gradients, how much is there at once.
LAYER_AT_ONCE = 1.0
# Arrays of logits that the loss has at once, in fp32: the logits, and their gradient.
LOGITS_AT_ONCE = 2.0
# Layers whose gathered weights are there at once: one that is used, and one that is on its way.
GATHERED_LAYERS = 2.0


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device.

    Attributes:
        parameters, optimizer, batch: arguments of the step. gradients: in fp32, and their sum over microbatches.
        weights: copies of this device's part in the compute type, and weights gathered for the layers at work.
        activations: kept for the backward pass. layer: of the layer at work. logits: of the loss.
        peak: the most that is there at once; less than the sum of the others.
    """

    parameters: float
    optimizer: float
    batch: float
    gradients: float
    weights: float
    activations: float
    layer: float
    logits: float
    peak: float

    @property
    def arguments(self) -> float:
        """Bytes of train state and batch."""
        return self.parameters + self.optimizer + self.batch

    @property
    def temporaries(self) -> float:
        """Bytes of everything else at the peak."""
        return self.peak - self.arguments


def estimate_memory(run: RunConfig, sizes: dict[str, int], platform: str) -> MemoryEstimate:
    """The memory of a run on a mesh with axes of these sizes.

    Raises:
        UserError: the mesh cannot divide a parameter.
    """
    placement = Placement.of(sizes, run.rules)
    model, step = run.model, run.step
    state = state_bytes(model, run.optimizer, placement)
    rows = step.batch_size / placement.ways('batch')
    tokens = rows * step.sequence_length / placement.ways('sequence') / step.gradient_accumulation

    costs = [layer_costs(layer, model, placement, step.sequence_length, platform) for layer in model.pattern]
    stages = sizes['pipeline']
    saved = sum(costs[i % len(costs)].saved(model) for i in range(model.num_layers)) * tokens / stages
    at_work = LAYER_AT_ONCE * max(cost.all() for cost in costs) * tokens
    logits = LOGITS_AT_ONCE * 4 * tokens * model.vocab_size / placement.ways('vocab')
    cast, gathered, head = _weights(run, placement)
    accumulated = state.gradients if step.gradient_accumulation > 1 else 0.0

    always = cast + saved + accumulated
    loss = always + logits + head
    backward = always + state.gradients + at_work + gathered
    update = state.gradients + accumulated
    batch = 5 * 4 * rows * step.sequence_length / placement.ways('sequence')
    arguments = state.parameters + state.optimizer + batch
    return MemoryEstimate(
        parameters=state.parameters,
        optimizer=state.optimizer,
        batch=batch,
        gradients=state.gradients + accumulated,
        weights=cast + gathered,
        activations=saved,
        layer=at_work,
        logits=logits,
        peak=arguments + max(loss, backward, update),
    )


def _weights(run: RunConfig, placement: Placement) -> tuple[float, float, float]:
    """Bytes of (this device's part in the compute type, the layers' weights gathered, the head's gathered)."""
    size = {'float32': 4, 'float64': 8}.get(run.model.compute_dtype, 2)
    cast = layers = head = 0.0
    for _, spec in named_specs(model_specs(run.model)):
        if spec.role in (Role.VECTOR, Role.EMBEDDING) and not (run.model.tied_embeddings and 'vocab' in spec.axes):
            continue
        stored = placement.rules.partition(spec.axes, placement.mesh, parameters=True)
        used = placement.rules.partition(spec.axes, placement.mesh, parameters=False)
        part, whole = float(size), float(size)
        for axis, length, here, there in zip(spec.axes, spec.shape, stored, used, strict=True):
            own = math.prod(placement.mesh.shape[name] for name in names(here))
            kept = math.prod(placement.mesh.shape[name] for name in names(here) if name in names(there))
            part *= length / own
            whole *= 1 if axis in ('layers', 'remainder') else length / kept
        cast += part if size != 4 else 0.0
        is_gathered = whole > part
        if spec.role is Role.HIDDEN:
            layers += whole if is_gathered else 0.0
        else:
            head += whole if is_gathered else 0.0
    return cast, GATHERED_LAYERS * layers / len(run.model.pattern), head
