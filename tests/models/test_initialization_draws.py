import jax
import numpy as np

from llm.models import initialization
from llm.models.initialization import Initialization, initialize
from llm.models.parameters import ParameterSpec, Role

SPECS = {'w': ParameterSpec((3, 4, 5), ('layers', 'embed', 'mlp'), Role.HIDDEN, inputs=(1,), outputs=(2,))}


def test_flat_and_shaped_draws_have_the_same_bits(monkeypatch):
    for truncated in (False, True):
        scheme = Initialization(truncated=truncated)
        flat = jax.jit(lambda seed, scheme=scheme: initialize(SPECS, scheme, seed))(0)
        monkeypatch.setattr(initialization, 'MAXIMUM_FLAT_DRAW', 0)
        shaped = jax.jit(lambda seed, scheme=scheme: initialize(SPECS, scheme, seed))(0)
        monkeypatch.undo()
        np.testing.assert_array_equal(flat['w'], shaped['w'])
