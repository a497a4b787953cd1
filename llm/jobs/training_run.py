"""What the jobs that train have in common: a run directory that is claimed, resumed, and complete in the end."""

import contextlib
import dataclasses
import itertools
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm.data.sources import ReadCounts, Source, read_documents
from llm.data.vocabularies import Vocabulary, VocabularyConfig
from llm.data.vocabularies.training import sample_documents, train_on_sample
from llm.errors import UserError
from llm.models.model import ModelConfig
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


def check_size(vocabulary: Vocabulary, model: ModelConfig, extra: int = 0) -> None:
    """Raises UserError where a model has fewer tokens than a vocabulary, and the `extra` that objectives use."""
    if vocabulary.size + extra > model.vocab_size:
        own = f', the objective {extra} of its own,' if extra else ''
        raise UserError(
            f'the vocabulary has {vocabulary.size} tokens{own} and the model {model.vocab_size}',
            where=f'{type(model).__name__}.vocab_size',
            fix=f'Set it to {vocabulary.size + extra} or more, or use a smaller vocabulary.',
        )


def keep_vocabulary(directory: Path, vocabulary: Vocabulary) -> None:
    """Save the run's own copy, if it has none; a kill leaves none or a whole one."""
    kept = directory / VOCABULARY
    if not kept.exists():
        partial = kept.with_name(f'{VOCABULARY}.partial')
        shutil.rmtree(partial, ignore_errors=True)
        vocabulary.save(partial)
        partial.rename(kept)


def train_on_groups(
    config: VocabularyConfig,
    groups: Sequence[Sequence[Source]],
    model_size: int,
    extra_ids: Callable[[Vocabulary], int] = lambda vocabulary: 0,
    *,
    even: bool = False,
) -> Vocabulary:
    """A vocabulary learnt from equal bytes of the training text of each group, and of each source within one.

    Args:
        model_size: tokens that the model has, which a vocabulary gets that has no size of its own.
        extra_ids: how many of them objectives take of a vocabulary.
        even: take no more of any group than there is of the smallest; else all is taken where there is less.
    """
    if config.size is None and config.kind != 'bytes':
        # What the objectives add does not depend on the size.
        extra = extra_ids(train_on_sample(VocabularyConfig('bytes', special_tokens=config.special_tokens), []))
        config = dataclasses.replace(config, size=model_size - extra)
    if config.kind == 'bytes':  # needs no text
        return train_on_sample(config, [])
    say(f'training a {config.kind} vocabulary')

    def sampled(share: int) -> list[list[str]]:
        return [
            [
                text
                for source in group
                for text in sample_documents(
                    read_documents(source, 'train', ReadCounts()), share // len(group), config.seed
                )
            ]
            for group in groups
        ]

    samples = sampled(config.sample_bytes // len(groups))
    sizes = [sum(len(text.encode()) for text in sample) for sample in samples]
    if even and min(sizes) < max(sizes):
        samples = sampled(min(sizes))
    return train_on_sample(config, list(itertools.chain.from_iterable(samples)))


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
