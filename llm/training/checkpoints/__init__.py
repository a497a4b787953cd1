"""Checkpoints: saved in the background, committed whole or not at all, verified byte by byte before they are used.

A checkpoint is a directory (see `directory` for how it comes and goes):

    step_000001000/
        state/                 the arrays, by Orbax (OCDBT, zarr3): any mesh reads what any other wrote
        metadata.json          step, names, shapes and dtypes of the arrays, metrics, environment, the caller's metadata
        manifest_00000.json    size and SHA-256 of every file that process 0 wrote, and so for each process
        COMMITTED              the same for the manifests, and for itself; see `manifest`

`Checkpointer` is for the one run that writes a directory; `restore_parameters` reads anybody's. For models that no host
can hold there are `StreamedArray`, to be saved in place of an array, and `StoredParameters`, to read slices.
"""

from llm.training.checkpoints.checkpointer import Checkpointer
from llm.training.checkpoints.config import CheckpointConfig
from llm.training.checkpoints.directory import committed_steps
from llm.training.checkpoints.restoring import Restored, restore_parameters
from llm.training.checkpoints.stored import StoredParameters
from llm.training.checkpoints.streaming import StreamedArray

__all__ = [
    'CheckpointConfig',
    'Checkpointer',
    'Restored',
    'StoredParameters',
    'StreamedArray',
    'committed_steps',
    'restore_parameters',
]
