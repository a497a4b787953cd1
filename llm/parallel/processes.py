"""One run on many processes, of one machine or of many: who they are, how they join, and what process 0 does for all.

Which processes there are comes from flags, from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from
the cluster (TPU pods on GKE and Compute Engine, Slurm, Open MPI, Kubernetes), in that order; JAX finds out the latter.
What a lost process does to the others is in `llm.parallel.supervision`.
"""

import dataclasses
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from llm.errors import UserError
from llm.parallel.accelerators import has_tpu

T = TypeVar('T')

# What JAX takes for these itself.
INITIALIZATION_SECONDS, HEARTBEAT_SECONDS = 300, 100
_ADDRESS, _COUNT, _ID = 'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'
_LOCAL_DEVICES = 'JAX_LOCAL_DEVICE_IDS'  # JAX reads this one by itself, too
# Process 0 may tokenise for a day while the others wait.
_PATIENCE_SECONDS, _SECONDS_BETWEEN_MESSAGES = 7 * 24 * 3600, 30
# For the others to hear why process 0 ends, and then to end before it does.
_HEARING_SECONDS, _LEAVING_SECONDS = 60, 5
# Network file systems show new files to other hosts late.
_VISIBLE_SECONDS = 60
# A death is known when heartbeats are missing for the set time; that is looked at now and then.
_VERDICT_SECONDS = 15


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        coordinator_address: host:port, where process 0 listens.
        num_processes, process_id: how many, and which of them this is.
        local_device_ids: of the GPUs that this process takes, '0,1' for two; '' for all that it sees.
        initialization_timeout_seconds: how long to wait for all of them to join.
        heartbeat_timeout_seconds: after how long without a sign of life a process is lost, and the others stop.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: str = ''
    initialization_timeout_seconds: int = INITIALIZATION_SECONDS
    heartbeat_timeout_seconds: int = HEARTBEAT_SECONDS

    def __post_init__(self) -> None:
        host, _, port = self.coordinator_address.rpartition(':')
        if not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise UserError(
                f'the coordinator address {self.coordinator_address!r} is not HOST:PORT',
                fix='For example --coordinator_address=10.0.0.1:8476, the same on every process.',
            )
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f'process_id is {self.process_id} of {self.num_processes} processes',
                fix='Number them from 0: the last is num_processes - 1.',
            )
        if min(self.initialization_timeout_seconds, self.heartbeat_timeout_seconds) < 1:
            raise UserError('a timeout is less than a second', fix='Use at least 1.')

    def variables(self) -> dict[str, str]:
        """The environment variables that say the same, timeouts apart."""
        local = {_LOCAL_DEVICES: self.local_device_ids} if self.local_device_ids else {}
        return {_ADDRESS: self.coordinator_address, _COUNT: f'{self.num_processes}', _ID: f'{self.process_id}', **local}


def find_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout_seconds: int = INITIALIZATION_SECONDS,
    heartbeat_timeout_seconds: int = HEARTBEAT_SECONDS,
    environ: Mapping[str, str] = os.environ,
) -> Processes | None:
    """The processes of this run; None where it has only this one, and then JAX is not even imported.

    Args:
        coordinator_address, num_processes, process_id: as on the command line, None for what was not given. One
            process with an address is started like many: its collectives are then the same as those of many.

    Raises:
        UserError: a value is wrong or missing, or the cluster does not say.
    """
    address = coordinator_address or environ.get(_ADDRESS)
    count = _number(environ, _COUNT) if num_processes is None else num_processes
    index = _number(environ, _ID) if process_id is None else process_id
    local = environ.get(_LOCAL_DEVICES, '')
    if count == 1:
        if address is None:
            return None
        index = index or 0
    timeout = initialization_timeout_seconds
    if None in (address, count, index) and _may_be_a_cluster(environ):
        try:
            address, count, index, local = _detect(address, count, index, local, timeout)
        except Exception as error:
            raise UserError(
                f'the cluster does not say which processes there are ({error})',
                fix='Give --coordinator_address, --num_processes and --process_id; or --num_processes=1 to run alone.',
            ) from error
    if address is None and count in (None, 1) and index is None:
        return None
    if address is None or count is None or index is None:
        given = {'coordinator_address': address, 'num_processes': count, 'process_id': index}
        missing = ' and '.join(f'--{name} ({_variable(name)})' for name, value in given.items() if value is None)
        raise UserError(f'{missing} missing, and no cluster was found that would say', fix='All three go together.')
    return Processes(address, count, index, local, timeout, heartbeat_timeout_seconds)


def _variable(name: str) -> str:
    return f'JAX_{name.upper()}'


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    try:
        return None if text is None else int(text)
    except ValueError:
        raise UserError(f'{text!r} is not a number', where=name, fix='Set it to one, or unset it.') from None


def _may_be_a_cluster(environ: Mapping[str, str]) -> bool:
    """Whether there is any of the signs by which JAX knows a cluster; without them it need not be asked."""
    signs = ('SLURM_PROCID', 'OMPI_MCA_orte_hnp_uri', 'JOB_COMPLETION_INDEX', 'JAX_FORCE_TPU_INIT')
    return has_tpu() or any(sign in environ for sign in signs)


def _detect(
    address: str | None, count: int | None, index: int | None, local: str, timeout: int
) -> tuple[str | None, int | None, int | None, str]:
    """What is missing, from the cluster."""
    # jax.distributed.initialize asks these same classes, but only on its way to join.
    from jax._src.clusters import ClusterEnv

    kinds: Any = ClusterEnv._cluster_types
    found = next((kind for kind in kinds if not kind.opt_in_only_method and kind.is_env_present()), None)
    if found is None:
        return address, count, index, local
    count = found.get_process_count() if count is None else count
    if count == 1 and address is None:  # not to wait for the name of a host to be known
        return None, 1, None, local
    given = [int(device) for device in local.split(',')] if local else None
    address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
        address, count, index, given, None, timeout
    )
    return address, count, index, ','.join(map(str, devices or ()))


def _check_port(processes: Processes) -> None:
    """Raises OSError if process 0 cannot listen on its port, of which jaxlib dies with SIGSEGV."""
    if processes.process_id == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(('', int(processes.coordinator_address.rpartition(':')[2])))


@contextmanager
def joined(processes: Processes | None) -> Iterator[None]:
    """Join the others before the block and leave with them after it; nothing for None. JAX must not be in use yet.

    A block that raises does not leave: the others cannot go on without this process, and it does not wait for them. A
    UserError or KeyboardInterrupt comes out, for `leave_at_once` after it was told; anything else is printed and ends
    the process.

    Raises:
        UserError: process 0 cannot listen on its port.
    """
    if processes is None:
        yield
        return
    import jax

    # JAX's handler for SIGTERM would swallow it: the training loop starts that service when it can heed it.
    jax.config.update('jax_enable_preemption_service', False)
    # The default of today, and what the promise of equal bits is about.
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    local = [int(device) for device in processes.local_device_ids.split(',') if device]
    try:
        _check_port(processes)
        jax.distributed.initialize(
            processes.coordinator_address,
            processes.num_processes,
            processes.process_id,
            local_device_ids=local or None,
            cluster_detection_method='deactivate',
            initialization_timeout=processes.initialization_timeout_seconds,
            heartbeat_timeout_seconds=processes.heartbeat_timeout_seconds,
        )
    except (RuntimeError, OSError) as error:
        port = processes.coordinator_address.rpartition(':')[2]
        raise UserError(
            f'process {processes.process_id} of {processes.num_processes} cannot join ({error})',
            where=processes.coordinator_address,
            fix=f'Is port {port} of the host of process 0 in use? Choose another.' if processes.process_id == 0 else '',
        ) from error
    try:
        _wait_for_all(processes)
        yield
        sys.stdout.flush()
        jax.distributed.shutdown()
    except (UserError, KeyboardInterrupt, BrokenPipeError):
        raise
    except BaseException as error:
        if _may_come_from_a_lost_process(error):
            wait = processes.heartbeat_timeout_seconds + _VERDICT_SECONDS
            print(f'a collective failed; {wait} s will show whether a process was lost', file=sys.stderr, flush=True)
            time.sleep(wait)  # if so, JAX ends this process meanwhile
        traceback.print_exception(error)
        leave_at_once(1)


def _wait_for_all(processes: Processes) -> None:
    """Let no process begin before all know that they have joined.

    If process 0 failed before the answer to its joining had reached another, that one would ask until its time is over.
    """
    _state().client.wait_at_barrier('llm/joined', 1000 * processes.initialization_timeout_seconds)


def _may_come_from_a_lost_process(error: BaseException) -> bool:
    # Gloo's come as ValueError from some paths.
    text = str(error)
    return 'Gloo' in text or any(
        text.startswith(code) for code in ('UNAVAILABLE', 'ABORTED', 'CANCELLED', 'DEADLINE_EXCEEDED', 'UNKNOWN')
    )


def leave_at_once(code: int) -> None:
    """End a joined process with this exit code without waiting for the others; nothing if it has not joined."""
    if 'jax' in sys.modules:
        import jax

        if jax.distributed.is_initialized():
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once. Does not start JAX."""
    return _state().process_id == 0 if 'jax' in sys.modules else True


def require_one(what: str) -> None:
    """Raises UserError in a run of many processes: `what` needs only one."""
    if 'jax' in sys.modules and _state().num_processes > 1:
        raise UserError(f'{what} runs in one process', fix='Start it once, without --num_processes or srun.')


_calls = 0


def from_first(what: str, work: Callable[[], str]) -> str:
    """What `work` returns on process 0, which alone runs it, on every process. Call it in the same order on each.

    Args:
        what: for messages, as in 'tokenising'.

    Raises:
        UserError: on process 0 what `work` raises; on the others that it has.
    """
    state = _state()
    if state.num_processes == 1:
        return work()
    global _calls  # noqa: PLW0603  the same number on every process names this exchange
    _calls += 1
    key = f'llm/from_first/{_calls}/{what}'
    if state.process_id == 0:
        try:
            result = work()
        except Exception as error:
            state.client.key_value_set(key, f'!{type(error).__name__}: {error}')
            _wait_until_heard(state, key)
            raise
        state.client.key_value_set(key, f'={result}')
        return result
    answer = _answer(state.client, key, what)
    if answer[0] == '!':
        state.client.key_value_set(f'{key}/heard/{state.process_id}', '')
        raise UserError(f'process 0 failed at {what} ({answer[1:]})', fix='Its output says more.')
    return answer[1:]


def _wait_until_heard(state: Any, key: str) -> None:
    """Give the others time to read why: when process 0 ends, so does what they read it from."""
    deadline = time.monotonic() + _HEARING_SECONDS
    for process in range(1, state.num_processes):
        left = max(1, int(1000 * (deadline - time.monotonic())))
        with suppress(Exception):  # late or lost: it will hear that process 0 has ended
            state.client.blocking_key_value_get(f'{key}/heard/{process}', left)
    time.sleep(_LEAVING_SECONDS)


def _answer(client: Any, key: str, what: str) -> str:
    started = time.monotonic()
    while True:
        try:
            return str(client.blocking_key_value_get(key, _SECONDS_BETWEEN_MESSAGES * 1000))
        except Exception as error:
            if 'DEADLINE_EXCEEDED' not in str(error):
                raise
        waited = time.monotonic() - started
        if waited > _PATIENCE_SECONDS:
            raise UserError(f'process 0 is not done with {what} after {waited / 3600:.0f} hours')
        print(f'waiting for process 0: {what}, {waited / 60:.1f} min', file=sys.stderr, flush=True)


def first_then_others(what: str, work: Callable[[], T]) -> T:
    """`work` on process 0 and then on the others, which find on the disk that they share what it has made."""
    made: list[T] = []

    def on_first() -> str:
        made.append(work())
        return ''

    from_first(what, on_first)
    return made[0] if made else work()


def check_same(what: str, value: str) -> None:
    """Check that `value` is the same on every process.

    Raises:
        UserError: it is not that of process 0.
    """
    expected = from_first(what, lambda: value)
    if value != expected:
        raise UserError(
            f'the {what} is {value[:12]} on process {_state().process_id} and {expected[:12]} on process 0',
            fix='All processes must read the same files: use a file system that they share.',
        )


def check_shared(path: Path) -> None:
    """Check, on every process, that `path` is there, which process 0 has just written; waits a minute for it.

    Raises:
        UserError: it does not come into sight.
    """
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f'process {_state().process_id} does not see what process 0 has written',
                where=str(path),
                fix='Put it on a file system that all hosts share.',
            )
        time.sleep(0.5)


def _state() -> Any:
    from jax._src.distributed import global_state

    return global_state
