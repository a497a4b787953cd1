"""Arrays on disk: whole or not at all."""

import contextlib
import resource
import signal

import numpy as np
import pytest

from llm.data.documents.deduplication.sorted_runs import GROUPED, records, write_array


@contextlib.contextmanager
def files_of_at_most(size):
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1][1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])


def test_an_array_for_which_there_is_no_space_is_not_there(tmp_path):
    """np.save leaves the beginning of a small one, and says nothing."""
    array = records(GROUPED, key=np.arange(20), check=7, node=np.arange(20))
    path = tmp_path / 'a.npy'
    with files_of_at_most(300), pytest.raises(OSError, match='File too large'):
        write_array(path, array)
    assert not list(tmp_path.iterdir())
    for some in (array, array[:0], np.zeros(3, np.uint8)):
        write_array(path, some)
        found = np.load(path)
        assert found.dtype == some.dtype and np.array_equal(found, some)
