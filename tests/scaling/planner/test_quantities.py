import pytest

from llm.scaling.planner.quantities import byte_size, duration


@pytest.mark.parametrize(
    ('size', 'words'), [(0, '0.0 KB'), (1234, '1.2 KB'), (350.94e6, '350.9 MB'), (12.344e9, '12.34 GB')]
)
def test_byte_size(size, words):
    assert byte_size(size) == words


@pytest.mark.parametrize(
    ('seconds', 'words'), [(0, '0.0 us'), (5.67e-5, '56.7 us'), (0.1234, '123.4 ms'), (1.88, '1.88 s')]
)
def test_duration(seconds, words):
    assert duration(seconds) == words
