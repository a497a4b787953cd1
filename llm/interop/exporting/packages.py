"""Heavy packages that write programs: imported first where one is to be written, and without their complaints."""

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator, Sequence

from llm.errors import UserError


def check_installed(names: Sequence[str], what: str) -> None:
    """Import packages for the first time.

    Args:
        what: is written with them, for the message.

    Raises:
        UserError: one is not installed.
    """
    # TensorFlow, which jax2tf imports, complains of a machine without GPU; a setting of the user's stays.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    try:
        with without_logs():
            for name in names:
                importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'writing {what!r} needs {error.name}', fix="pip install 'llm-jax[export]'.") from error


@contextlib.contextmanager
def without_logs() -> Iterator[None]:
    """Without the complaints of jax2onnx about parts of it that are made for other libraries."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
