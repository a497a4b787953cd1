"""The plan job: does a training run fit a machine, what bounds it, which layout is best? The machine need not exist."""

import dataclasses
import sys
from pathlib import Path

from llm.configuration import Invocation
from llm.jobs.describe import describe
from llm.jobs.pretrain import Pretrain
from llm.scaling.planner.advice import cheapest_change
from llm.scaling.planner.page import render
from llm.scaling.planner.planning import estimate, plan
from llm.scaling.planner.records import candidate_record, plan_record, to_json
from llm.scaling.planner.run_config import ANY_STEPS, RunConfig
from llm.scaling.planner.search import SearchConfig, search
from llm.scaling.planner.text import format_plan, format_search
from llm.scaling.planner.topology import find_topology
from llm.training.run_directory import write_atomically


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Plan a training run for a machine that need not exist.

    Attributes:
        run: the pieces of a run, or a pretraining run as its own file describes it.
        topology: a TPU slice 'v5e:16x16', nodes of GPUs 'h100:8x4' (8 a node), or this CPU 'cpu:8'.
        num_slices: of a TPU topology, joined by the data-center network.
        compile_program: whether the TPU compiler has the last word; without it, and for GPUs, analytic models have.
        search: meshes, microbatches and remat policies to try instead of the run's own; None to plan the run as it is.
        output_directory: for plan.json and plan.html; None for text alone.
    """

    run: RunConfig | Pretrain
    topology: str
    num_slices: int = 1
    compile_program: bool = True
    search: SearchConfig | None = None
    output_directory: str | None = None

    def run_config(self) -> RunConfig:
        """The part of the run that is planned."""
        run = self.run
        if isinstance(run, RunConfig):
            return run
        # Components of one mixture have rows of the same shapes.
        objective = run.data.objectives()[0]
        return RunConfig(run.model, run.optimizer, run.step, run.mesh, run.rules, run.pipeline, objective)

    def __call__(self, invocation: Invocation) -> None:
        """Print the plan, and write it to the output directory."""
        topology = find_topology(self.topology, self.num_slices)
        if not self.compile_program:
            topology = dataclasses.replace(topology, compiles=False)
        run = self.run_config()
        if invocation.dry_run:
            run = run.fixed(topology.sizes(run.mesh))
            print(describe(run.model, run.optimizer, run.step, ANY_STEPS, run.mesh, run.rules, run.pipeline, run.row))
            return
        candidates = [] if self.search is None else search(run, topology, self.search, say=_say)
        if candidates:
            found = candidates[0].plan
            assert found is not None  # search raises if nothing is possible
        else:
            if topology.compiles:
                _say(f'compiling for {topology.name}')
            found = plan(run, topology) if topology.compiles else estimate(run, topology)
        record = plan_record(found, cheapest_change(found))
        tried = [candidate_record(each) for each in candidates]
        print(format_plan(record), end='')
        if tried:
            print('\n' + format_search(tried), end='')
        if self.output_directory is not None:
            directory = Path(self.output_directory)
            directory.mkdir(parents=True, exist_ok=True)
            write_atomically(directory / 'plan.json', to_json(record, tried))
            write_atomically(directory / 'plan.html', render(record, tried))
            _say(f'see {directory / "plan.html"}')
