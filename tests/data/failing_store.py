"""A store of files whose driver loses the connection, and has an error of its own for that."""

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FailingStore(MemoryFileSystem):
    """`failing://`: what is read at a file's beginning is there, and nothing behind it."""

    protocol = 'failing'

    def _open(self, path, mode='rb', **settings):
        file = super()._open(path, mode, **settings)
        if mode == 'rb':
            read = file.read
            file.read = lambda size=-1: read(size) if file.tell() == 0 else {}['connection']
        return file


def register():
    """Make the store known to fsspec."""
    fsspec.register_implementation('failing', FailingStore, clobber=True)
