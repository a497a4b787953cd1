"""Compiled programs kept on disk, so that the second start of a run does not compile again."""

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> None:
    """Keep compiled programs in $JAX_COMPILATION_CACHE_DIR, or ~/.cache/llm-jax/compiled; what is there is found."""
    if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
        jax.config.update('jax_compilation_cache_dir', str(Path('~/.cache/llm-jax/compiled').expanduser()))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
