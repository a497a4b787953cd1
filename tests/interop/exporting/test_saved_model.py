"""TensorFlow SavedModels, as a process that has no JAX runs them, against the models here."""

import subprocess
import sys

import numpy as np
import pytest

from tests.interop.exporting import small_models

# Loads a SavedModel without JAX: prompt, then one greedy token. Its arguments: directory, inputs, outputs.
_RUN = """
import sys
sys.modules['jax'] = None
import numpy as np
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
results = {}
with np.load(sys.argv[2]) as stored:
    for key in stored:
        signature, call, name = key.split('|')
        results.setdefault((signature, call), {})[name] = tf.constant(stored[key])
found = {}
for (signature, call), arrays in results.items():
    for name, value in model.signatures[signature](**arrays).items():
        found[f'{signature}|{call}|{name}'] = value.numpy()
np.savez(sys.argv[3], **found)
"""


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize('name', ['gemma', 't5'])
def test_tensorflow_alone_computes_what_the_model_does(tmp_path, name):
    programs = small_models.write(name, 'saved_model', tmp_path / name)
    given, wanted = {}, {}
    for program in programs:
        served = 'serving_default' if program.name == 'logits' else program.name
        for call, (arrays, made) in enumerate(small_models.calls(name, program, steps=2)):
            given |= {f'{served}|{call}|{key}': value for key, value in arrays.items()}
            wanted |= {f'{served}|{call}|{key}': value for key, value in made.items()}
    np.savez(tmp_path / 'in.npz', **given)
    command = [sys.executable, '-c', _RUN, *(str(tmp_path / each) for each in (name, 'in.npz', 'out.npz'))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / 'out.npz') as found:
        assert set(found) == set(wanted)
        for key, value in wanted.items():
            np.testing.assert_allclose(found[key], value, atol=1e-4, rtol=0)
    assert not (tmp_path / name / 'model.safetensors').exists()
