"""ONNX graphs as onnxruntime runs them, against the models here."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from llm.errors import UserError
from llm.interop.exporting.onnx_graphs import SUPPORTED
from llm.interop.exporting.writing import PLATFORMS, check_exportable
from llm.interop.safetensors import open_checkpoint
from tests.interop.exporting import small_models

pytestmark = pytest.mark.oracle


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('onnx')


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])


def called(run: onnxruntime.InferenceSession, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip((each.name for each in run.get_outputs()), run.run(None, arrays), strict=True))


if SUPPORTED:

    @pytest.mark.parametrize('name', list(small_models.configs()))
    def test_onnxruntime_computes_what_the_model_does_for_any_batch_and_length(folder, name):
        programs = small_models.write(name, 'onnx', folder / name)
        manifest = json.loads((folder / name / 'manifest.json').read_text())
        for program in programs:
            file = folder / name / manifest['signatures'][program.name]['file']
            run = session(file)
            assert [each.name for each in run.get_inputs()] == [each.name for each in program.inputs]
            for arrays, wanted in small_models.calls(name, program):
                outputs = called(run, arrays)
                assert set(outputs) == set(wanted)
                for key, value in outputs.items():
                    np.testing.assert_allclose(value, wanted[key], atol=1e-4, rtol=0)

    @pytest.mark.parametrize('name', ['llama', 't5'])
    def test_decode_goes_on_as_the_whole_row_says(folder, name):
        """Greedy tokens by the graph with a cache are those by the graph without one."""
        directory = folder / f'greedy {name}'
        programs = {program.name: program for program in small_models.write(name, 'onnx', directory)}
        run = {program: session(directory / f'{program}.onnx') for program in programs}
        arrays, encoder = small_models.arrays(programs['decode'], 1, 5), {}
        if 'encode' in run:
            encoder = small_models.arrays(programs['encode'], 1, 7)
            made = called(run['encode'], encoder)
            arrays |= {key: value for key, value in (encoder | made).items() if key in arrays}
        row = arrays['tokens'][:, : arrays['lengths'][0]]
        for _ in range(8):
            made = called(run['decode'], arrays)
            whole = called(run['logits'], {'tokens': row, **encoder})['logits'][:, -1]
            np.testing.assert_allclose(made['logits'], whole, atol=1e-4, rtol=0)
            arrays = small_models.next_arrays(made, arrays)
            assert whole.argmax(-1).tolist() == arrays['tokens'][0].tolist()
            row = np.concatenate([row, arrays['tokens']], axis=1)

    def test_graphs_share_one_file_of_parameters_and_hold_none(folder):
        directory = folder / 'parameters'
        small_models.write('gemma', 'onnx', directory)
        stored = open_checkpoint(directory)
        values = small_models.parameters('gemma')
        assert {name: tensor.shape for name, tensor in stored.items()} == {name: x.shape for name, x in values.items()}
        for file in ('logits.onnx', 'decode.onnx'):
            model = onnx.load(str(directory / file), load_external_data=False)
            onnx.checker.check_model(str(directory / file))
            outside = [each for each in model.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL]
            assert {entry.value for each in outside for entry in each.external_data if entry.key == 'location'} == {
                'model.safetensors'
            }
            total = sum(int(entry.value) for each in outside for entry in each.external_data if entry.key == 'length')
            assert total == sum(value.nbytes for value in values.values())
            assert all(np.prod(each.dims) < 100 for each in model.graph.initializer if each not in outside)

else:

    def test_jax_that_jax2onnx_does_not_know_is_refused():
        config = small_models.configs()['llama']
        with pytest.raises(UserError, match='jax2onnx cannot read programs of jax'):
            check_exportable(config, 'onnx', PLATFORMS)
