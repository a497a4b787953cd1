"""What the jobs that train have in common: a run directory that is claimed, resumed, and complete in the end."""

import contextlib
import shutil
import sys
from pathlib import Path
from typing import Any

from llm.data.vocabularies import Vocabulary
from llm.errors import UserError
from llm.parallel import processes
from llm.training.checkpoints import Checkpointer, committed_steps
from llm.training.run_directory import claim, write_atomically
from llm.training.run_lock import RunLock
from llm.training.step import State
from llm.training.trainer import Trainer

COMPLETE = 'complete'
VOCABULARY = 'vocabulary'


def say(text: str) -> None:
    """Print on the way, once for all processes."""
    if processes.is_first():
        print(text, file=sys.stderr, flush=True)


def claim_run(
    directory: Path, job: Any, operative_config: str, changeable: tuple[str, ...], stack: contextlib.ExitStack
) -> str:
    """Lock the directory as long as `stack` is open and make it the job's; 'complete', 'resuming', 'starting'."""
    stack.enter_context(RunLock(directory))
    resumed = claim(directory, job, operative_config, changeable=changeable)
    saved, complete = committed_steps(directory / 'checkpoints'), directory / COMPLETE
    if saved and complete.exists() and complete.read_text(encoding='utf-8').strip() == str(saved[-1]):
        return COMPLETE
    return 'resuming' if resumed else 'starting'


def mark_complete(directory: Path, step: int | None) -> None:
    """Say that the run ended after this step."""
    write_atomically(directory / COMPLETE, f'{step}\n')


def keep_vocabulary(directory: Path, vocabulary: Vocabulary) -> None:
    """Save the run's own copy, if it has none; a kill leaves none or a whole one."""
    kept = directory / VOCABULARY
    if not kept.exists():
        partial = kept.with_name(f'{VOCABULARY}.partial')
        shutil.rmtree(partial, ignore_errors=True)
        vocabulary.save(partial)
        partial.rename(kept)


def restored_state(
    trainer: Trainer, checkpointer: Checkpointer, data: dict[str, str], fix: str
) -> tuple[State, list[str]] | None:
    """The state of the newest whole checkpoint, and what was wrong with newer ones; None if there is none.

    Args:
        data: digests that must be those of the checkpoint. fix: what to do if they are not.
    """
    saved = processes.from_first('looking for checkpoints', lambda: str(checkpointer.latest_step() is not None))
    if saved != str(True):
        return None
    restored = checkpointer.restore(trainer.state_dict(trainer.abstract_state))
    for name, digest in data.items():
        if restored.metadata.get(name) != digest:
            raise UserError(
                f'the {name} is not what this checkpoint was trained with', where=str(restored.path), fix=fix
            )
    say(f'restored the checkpoint of step {restored.step}')
    return trainer.from_state_dict(restored.state), restored.rejected
