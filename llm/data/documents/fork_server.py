"""Worker processes that begin at once: forked from one that has imported what they need, and does nothing else."""

import multiprocessing
import sys
from multiprocessing.context import ForkServerContext

_PACKAGE = 'llm.data.documents'


def fork_server() -> ForkServerContext:
    """The context of workers of this process. All share one server, which the first worker starts and no JAX is in.

    A fork of this process itself may hang, as JAX runs threads in it.
    """
    context = multiprocessing.get_context('forkserver')
    ours = [name for name in sys.modules if name.startswith(_PACKAGE)]
    context.set_forkserver_preload([*sorted(ours), 'pyarrow.parquet', 'tqdm'])
    return context
