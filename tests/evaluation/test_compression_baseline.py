import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from llm.errors import UserError
from llm.evaluation.compression_baseline import xz_baselines


def library_source(pattern: str) -> bytes:
    """Real text that every machine has."""
    files = sorted(Path(sysconfig.get_path('stdlib')).glob(pattern))
    return b''.join(file.read_bytes() for file in files)


def xz_program(data: bytes) -> int:
    """Size that the `xz` program makes of `data`; one thread, as several would write other block headers."""
    return len(
        subprocess.run(['xz', '-9', '--threads=1', '--stdout'], input=data, check=True, capture_output=True).stdout
    )


@pytest.mark.oracle
def test_sizes_are_those_of_the_program():
    train, validation = library_source('json/*.py') + library_source('[a-c]*.py'), library_source('email/*.py')
    assert xz_baselines(train, validation) == {
        'xz_alone_bits_per_byte': 8 * xz_program(validation) / len(validation),
        'xz_primed_bits_per_byte': 8 * (xz_program(train + validation) - xz_program(train)) / len(validation),
    }


def test_text_that_was_seen_costs_next_to_nothing():
    text = library_source('json/*.py')
    result = xz_baselines(text, text)
    assert 1.5 < result['xz_alone_bits_per_byte'] < 3
    assert result['xz_primed_bits_per_byte'] < 0.02


def test_noise_costs_eight_bits():
    noise = np.random.default_rng(0).bytes(200_000)
    result = xz_baselines(noise[:100_000], noise[100_000:])
    assert result['xz_alone_bits_per_byte'] == pytest.approx(8, rel=2e-3)
    assert result['xz_primed_bits_per_byte'] == pytest.approx(8, rel=2e-3)


def test_nothing_to_compress_is_a_user_error():
    with pytest.raises(UserError, match='no validation bytes'):
        xz_baselines(b'train', b'')
