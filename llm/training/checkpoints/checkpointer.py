"""The one writer of a run's checkpoints: saves in the background, commits, lets old ones go, restores."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from llm.errors import UserError
from llm.training.checkpoints import directory as directories
from llm.training.checkpoints.arrays import ArrayWriter, describe
from llm.training.checkpoints.config import CheckpointConfig
from llm.training.checkpoints.disk_errors import IncompleteSave, as_user_error, check_space
from llm.training.checkpoints.manifest import missing_manifests, write_manifest, write_marker
from llm.training.checkpoints.restoring import ARRAYS, METADATA, Restored, agreed_steps, restore_newest, warn
from llm.training.environment import environment, warn_about_changes

_BARRIER_SECONDS = 600


class Checkpointer:
    """Saves and restores the checkpoints of one run.

    There must be one per directory (hold a `RunLock`): it removes what killed saves left behind. In a job of many
    processes each makes one and calls the same methods in the same order; the directory is shared by all.

    Args:
        directory: where the checkpoints are; made if need be.
        config: see CheckpointConfig.

    Raises:
        UserError: the directory cannot be made or written.
    """

    def __init__(self, directory: str | Path, config: CheckpointConfig):
        if '://' in str(directory):
            raise UserError(
                'checkpoints need a file system that can rename a directory',
                where=str(directory),
                fix='Use a local or network file system.',
            )
        self.directory = Path(directory).absolute()
        self.config = config
        self._writer: ArrayWriter | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._current: int | None = None  # the step that this object has saved or restored last
        self._rejected: set[int] = set()
        self._barriers = 0
        if jax.process_index() == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                directories.remove_leftovers(self.directory)
            except OSError as error:
                raise as_user_error(error, 'cannot prepare the directory of checkpoints', self.directory) from error
        self._barrier('start')

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._thread is not None:
            # What ends the run is `error`; a save that fails beside it must not hide it.
            self._thread.join()

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, rising, without those that `restore` has found to be damaged."""
        return [step for step in directories.committed_steps(self.directory) if step not in self._rejected]

    def latest_step(self) -> int | None:
        """The newest of `steps`, None if there is none. A save in flight does not count."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, metadata: dict[str, Any], metrics: dict[str, float] | None = None) -> bool:
        """Begin to save; returns when the arrays of `state` may be donated, before they are written.

        Waits for the save before, if that is still in flight.

        Args:
            step: rising from save to save. The step saved or restored last is not saved again.
            state: pytree of jax arrays.
            metadata: JSON values.
            metrics: for CheckpointConfig.best_metric.

        Returns:
            Whether there was something to save.

        Raises:
            UserError: this save or the one before ran out of space (with on_full_disk 'stop'), was not permitted or
                met a broken disk; or checkpoints of later steps are in the directory, which this would make stale.
        """
        self.wait()
        if step == self._current:
            return False
        shardings = (getattr(x, 'sharding', None) for x in jax.tree.leaves(state))
        content = {
            'step': step,
            'arrays': describe(state),
            'metrics': {name: float(value) for name, value in (metrics or {}).items()},
            'environment': environment(_mesh_shape(shardings)),
            'metadata': metadata,
        }
        encoded = json.dumps(content, indent=1).encode()
        try:
            self._prepare(step, encoded, size=sum(x.nbytes for x in jax.tree.leaves(state)))
            self._writer = self._writer or ArrayWriter()
            self._writer.start(directories.partial_path(self.directory, step) / ARRAYS, state)
        except Exception as error:
            self._fail(step, error)
        else:
            self._thread = threading.Thread(target=self._finish, args=(step,), name=f'checkpoint {step}')
            self._thread.start()
        if not self.config.asynchronous:
            self.wait()
        self.check()
        return True

    def check(self) -> None:
        """Raise what went wrong with a save in the background, if anything has; does not wait."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Return when no save is in flight; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Wait, and let go of the background threads."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
        """Read the newest checkpoint of which every file has the digest it was saved with, or that of `step`.

        Warns on stderr of every bad file in newer checkpoints, which are passed over, and of what has changed in the
        environment so that resumed training may not give the same bits.

        Args:
            abstract_state: pytree of jax.ShapeDtypeStruct with shardings, equal to the saved state in structure,
                shapes and dtypes; shardings may be of any mesh.

        Raises:
            UserError: there is no checkpoint, none is whole, or the state does not fit (which array, how).
        """
        self.wait()
        steps = agreed_steps(self.directory)
        if step is not None:
            if step not in steps:
                raise UserError(
                    f'there is no checkpoint of step {step}', where=str(self.directory), fix=f'Have {steps}.'
                )
            steps = [step]
        restored = restore_newest(self.directory, steps, abstract_state)
        self._rejected.update(restored.rejected_steps)
        self._current = restored.step
        shardings = (getattr(x, 'sharding', None) for x in jax.tree.leaves(abstract_state))
        changes = warn_about_changes(restored.environment, environment(_mesh_shape(shardings)))
        if changes:
            warn(f'{restored.path}: going on from here may not give the same bits as before: {"; ".join(changes)}')
        return restored

    def _prepare(self, step: int, metadata: bytes, size: int) -> None:
        """Make the partial directory with the metadata in it, on process 0; every process hears whether that worked."""
        failure: Exception | None = None
        if jax.process_index() == 0:
            try:
                later = [other for other in self.steps() if other >= step]
                if later:
                    raise UserError(
                        f'step {step} cannot be saved beside checkpoints of the same or later steps: {later}',
                        where=str(self.directory),
                        fix='Resume from the newest, use another run directory, or move those checkpoints away.',
                    )
                # A write that ended after its save had failed may have brought back a directory deleted by then.
                directories.remove_leftovers(self.directory)
                check_space(self.directory, size, _not_saved(step))
                partial = directories.partial_path(self.directory, step)
                partial.mkdir()
                directories.write_durably(partial / METADATA, metadata)
            except Exception as error:
                failure = error
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.broadcast_one_to_all(np.int32(failure is not None)) and failure is None:
                raise IncompleteSave('process 0 could not begin to save', where=str(self.directory))
        if failure is not None:
            raise failure

    def _finish(self, step: int) -> None:
        """The background part of a save, on every process."""
        partial = directories.partial_path(self.directory, step)
        final = directories.step_path(self.directory, step)
        primary = jax.process_index() == 0
        try:
            error: Exception | None = None
            try:
                assert self._writer is not None
                self._writer.wait()
                write_manifest(partial, jax.process_index())
            except Exception as caught:
                error = caught
            # A process that failed comes to the barrier too: without its manifest nothing is committed.
            self._barrier(f'{step} written')
            if primary and error is None:
                try:
                    self._commit(step, partial)
                    self._delete_expired(step)
                except Exception as caught:
                    error = caught
            self._barrier(f'{step} committed')
            if error is None and not final.is_dir():
                error = IncompleteSave('process 0 did not commit it', where=str(final))
            if error is not None:
                raise error
        except Exception as caught:
            self._fail(step, caught)
            return
        self._current = step
        self._rejected.clear()

    def _commit(self, step: int, partial: Path) -> None:
        missing = missing_manifests(partial, jax.process_count())
        if missing:
            raise IncompleteSave(f'processes {missing} did not write their part', fix='Their output says why.')
        write_marker(partial, step)
        directories.publish(self.directory, step)

    def _delete_expired(self, newest: int) -> None:
        """Let go of what no rule keeps and of damaged checkpoints, now that `newest` is committed."""
        damaged = self._rejected - {newest}
        try:
            steps = set(directories.committed_steps(self.directory)) - damaged
            expired = self.config.expired({step: self._metrics(step) for step in steps})
            for step in sorted(damaged.union(expired)):
                if directories.step_path(self.directory, step).is_dir():
                    directories.delete(self.directory, step)
            # A damaged checkpoint of the same step, which `publish` has put aside.
            directories.remove_leftovers(self.directory)
        except OSError as error:
            warn(str(as_user_error(error, 'old checkpoints were not deleted', self.directory)))

    def _metrics(self, step: int) -> dict[str, float]:
        try:
            content = json.loads((directories.step_path(self.directory, step) / METADATA).read_bytes())
            return dict(content['metrics'])
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # damaged: not among the best

    def _fail(self, step: int, error: Exception) -> None:
        """Remove the partial checkpoint, then warn, or keep the error for the next call of the training thread."""
        partial = directories.partial_path(self.directory, step)
        found = as_user_error(error, _not_saved(step), partial)
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(found, IncompleteSave) and self.config.on_full_disk == 'continue':
            kept = self.latest_step()
            warn(f'{found.where}: {found.what}. Going on; the newest checkpoint is that of step {kept}.')
            return
        if found is not error:
            found.__cause__ = error
        self._error = found

    def _barrier(self, name: str) -> None:
        """Wait for all processes. Not by a collective: in a background thread that could pass one of the step's."""
        if jax.process_count() == 1:
            return
        import orbax.checkpoint as ocp

        self._barriers += 1
        where = hashlib.sha256(str(self.directory).encode()).hexdigest()[:16]
        key = f'llm checkpoint {where} {self._barriers} {name}'
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=_BARRIER_SECONDS * 1000)


def _not_saved(step: int) -> str:
    return f'the checkpoint of step {step} was not saved'


def _mesh_shape(shardings: Iterable[Any]) -> Mapping[str, int] | None:
    return next((s.mesh.shape for s in shardings if isinstance(s, jax.sharding.NamedSharding)), None)
