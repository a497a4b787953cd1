"""Stopping a run when it is asked to, after a step, with everything saved; many processes stop after the same one."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax


class StopRequests:
    """SIGTERM and SIGINT, as the training loop asks for them between steps.

    Attributes:
        reason: for messages, what stopped the run.
    """

    def __init__(self) -> None:
        self.received: list[int] = []

    def due(self, step: int) -> bool:
        """Whether to stop now that `step` updates are done; every process must ask at every step."""
        return bool(self.received)

    @property
    def reason(self) -> str:
        return signal.Signals(self.received[0]).name if self.received else 'a signal'


class _AgreedRequests(StopRequests):
    """Of many processes: a signal to any of them stops all, after one step that JAX's coordination service finds.

    A process that stopped by itself would leave the others in a collective without it.
    """

    def due(self, step: int) -> bool:
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        return reached_preemption_sync_point(step)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Collects SIGTERM and SIGINT within the block, instead of dying; a second SIGINT interrupts at once.

    Outside the main thread signals are left alone.
    """
    with contextlib.ExitStack() as stack:
        many = jax.distributed.is_initialized() and jax.process_count() > 1
        if many:
            stack.enter_context(_preemption_service())
        requests = _AgreedRequests() if many else StopRequests()

        def handle(number: int, frame: Any) -> None:
            if requests.received and number == signal.SIGINT:
                raise KeyboardInterrupt
            requests.received.append(number)
            if many:
                os.kill(os.getpid(), signal.SIGTERM)  # the one that the service listens to

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if many else (signal.SIGTERM, signal.SIGINT):
                stack.callback(signal.signal, number, signal.signal(number, handle))
        yield requests


@contextlib.contextmanager
def _preemption_service() -> Iterator[None]:
    """JAX's handler for SIGTERM, in the block only: elsewhere a process may as well die of it."""
    from jax._src.distributed import global_state

    previous = signal.getsignal(signal.SIGTERM)
    settings: Any = jax.config  # its attributes are made at run time
    enabled = settings.jax_enable_preemption_service
    settings.update('jax_enable_preemption_service', True)
    try:
        global_state.initialize_preemption_sync_manager()
        yield
    finally:
        if global_state.preemption_sync_manager is not None:
            global_state.preemption_sync_manager.shutdown()
            global_state.preemption_sync_manager = None
        settings.update('jax_enable_preemption_service', enabled)
        signal.signal(signal.SIGTERM, previous)
