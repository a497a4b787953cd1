"""Serialized StableHLO, loaded again, against the programs that it was made from."""

import json

import jax
import numpy as np
import pytest

from llm.errors import UserError
from llm.interop.exporting.stablehlo import load_programs
from tests.interop.exporting import small_models


@pytest.mark.parametrize('name', ['gemma', 'mixtral', 't5'])
def test_programs_come_back_to_the_bit(tmp_path, name):
    programs = small_models.write(name, 'jax_export', tmp_path / name)
    loaded = load_programs(tmp_path / name)
    assert set(loaded) == {program.name for program in programs}
    for program in programs:
        for arrays, wanted in small_models.calls(name, program, rows=((2, 7),), steps=1):
            found = loaded[program.name](arrays)
            assert set(found) == set(wanted)
            for key, value in wanted.items():
                np.testing.assert_array_equal(np.asarray(found[key]), value)
    signatures = json.loads((tmp_path / name / 'manifest.json').read_text())['signatures']
    for program in programs:
        said = signatures[program.name]
        exported = jax.export.deserialize(bytearray((tmp_path / name / said['file']).read_bytes()))
        assert exported.platforms == ('cpu', 'cuda', 'tpu')
        assert exported.calling_convention_version == said['calling_convention_version']
        assert [each['name'] for each in said['inputs']] == [each.name for each in program.inputs]


def test_other_platforms_and_directories_are_refused(tmp_path):
    small_models.write('mamba', 'jax_export', tmp_path / 'tpu', platforms=('tpu',))
    with pytest.raises(UserError, match='made for tpu, and this is cpu'):
        load_programs(tmp_path / 'tpu')
    with pytest.raises(UserError, match='has no manifest.json'):
        load_programs(tmp_path)
