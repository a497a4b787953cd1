"""Shared by the tests of llm.data."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope='session')
def dev_data() -> Path:
    """The folder of real data for development: the environment variable LLM_DEV_DATA, or ../shared/data of the repo."""
    folder = Path(os.environ.get('LLM_DEV_DATA', Path(__file__).parents[3] / 'shared' / 'data'))
    assert folder.is_dir(), f'{folder} is missing: set LLM_DEV_DATA to the folder of real data'
    return folder
