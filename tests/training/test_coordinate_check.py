"""muP by what it promises: no activation moves more or less because the model is wider. Otherwise some do."""

import dataclasses
import math

import numpy as np
import pytest

from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.initialization import Initialization
from llm.models.layer import LayerConfig
from llm.models.mamba import MambaConfig
from llm.models.mamba2 import Mamba2Config
from llm.models.moe import MoeConfig
from llm.models.multi_token import MultiTokenConfig
from llm.training.coordinate_check import Coordinate, check_coordinates, slopes
from llm.training.optimizers import OptimizerConfig
from llm.training.schedules import ScheduleConfig
from llm.training.step import StepConfig
from tests.models.small_encoders import bert, t5

pytestmark = pytest.mark.usefixtures('compiled_quickly')

WIDTHS = (64, 128, 256, 512, 1024)
LAYER = LayerConfig(
    mixer=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=16),
    feed_forward=FeedForwardConfig(d_ff=64, activation='gelu'),
)
# So small that doubling them doubles every change: where changes saturate, all parametrizations look alike.
RATES = {'adamw': 3e-4, 'sgd': 0.1, 'muon': 3e-4}


def measured(kind, widths, *, mup, tied=False, layer=LAYER, multi_token=None):
    """Slope of each activation after two steps: under muP the output starts at zero, and one step moves logits only."""
    model = DecoderConfig(
        vocab_size=64,
        d_model=64,
        num_layers=1,
        pattern=(layer,),
        position='none',
        tied_embeddings=tied,
        initialization=Initialization('mup' if mup else 'fan_in', std=1.0),
        mup_base_width=64 if mup else None,
        multi_token=multi_token,
    )
    found, count = slopes_of(model, kind, widths)
    further = [] if multi_token is None else ['2 ahead', '2 ahead, target logits']
    assert sorted(found) == sorted(['embedding', 'layer 1', *further, 'logits', 'target logits'])
    assert count == len(found) * len(widths) * 2
    return found


def slopes_of(model, kind, widths):
    """Slopes after two steps, and how many coordinates there are."""
    optimizer = OptimizerConfig(
        kind=kind,
        learning_rate=RATES[kind],
        muon_learning_rate=1e-3,
        weight_decay=0.0,
        clip_norm=None,
        schedule=ScheduleConfig('constant'),
    )
    # Few tokens: what is common to their directions fades against what is random only where widths are large.
    coordinates = check_coordinates(model, optimizer, StepConfig(4, 8), widths, steps=2)
    return slopes(coordinates, 2), len(coordinates)


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'widths'), [('adamw', WIDTHS), ('sgd', (64, 1024)), ('muon', (64, 512))])
def test_mup_is_flat(kind, widths):
    found = measured(kind, widths, mup=True)
    assert all(abs(slope) < 0.12 for slope in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize('mixer', [MambaConfig(128, 4, 8), Mamba2Config(8, 16, 16)], ids=lambda m: type(m).__name__)
def test_mup_is_flat_for_mamba(mixer):
    """Also where b and c go from the width to a state of one size and back."""
    found = measured('adamw', (64, 256, 512), mup=True, layer=LayerConfig(mixer, None))
    assert all(abs(slope) < 0.12 for slope in found.values()), found


@pytest.mark.slow
def test_mup_is_flat_for_multi_token_prediction():
    found = measured('adamw', (64, 512), mup=True, multi_token=MultiTokenConfig(1))
    assert all(abs(slope) < 0.12 for slope in found.values()), found


@pytest.mark.slow
def test_mup_is_flat_with_tied_embeddings():
    found = measured('adamw', (64, 512), mup=True, tied=True)
    # Other logits also change by chance overlap of random embeddings with the hidden state, which fades with the width.
    del found['logits']
    assert all(abs(slope) < 0.12 for slope in found.values()), found


def with_mup(config, base):
    return dataclasses.replace(config, initialization=Initialization('mup', std=1.0), mup_base_width=base)


@pytest.mark.slow
def test_mup_is_flat_for_an_encoder():
    found, _ = slopes_of(with_mup(bert(1, vocab=64, width=64), 64), 'adamw', (64, 512))
    assert list(found) == ['embedding', 'layer 1', 'logits', 'target logits']
    del found['logits']  # tied: chance overlap
    assert all(abs(slope) < 0.15 for slope in found.values()), found


@pytest.mark.slow
def test_mup_is_flat_for_an_encoder_decoder():
    found, _ = slopes_of(with_mup(t5(1, vocab_size=64), 32), 'adamw', (64, 512))
    assert set(found) == {'embedding', 'encoder layer 1', 'decoder layer 1', 'logits', 'target logits'}
    assert all(abs(slope) < 0.15 for slope in found.values()), found


@pytest.mark.slow
def test_the_standard_parametrization_is_not():
    found = measured('adamw', (64, 512), mup=False)
    assert found['layer 1'] > 0.4 and found['logits'] > 0.4, found
    # What it shares with muP: an embedding's rate does not depend on the width.
    assert abs(found['embedding']) < 0.12


def test_slopes_are_fitted_to_logarithms():
    coordinates = [
        Coordinate(width, step, name, step * size)
        for width in WIDTHS
        for step in (1, 2)
        for name, size in (('flat', 0.3), ('growing', 1e-3 * width), ('halving', width**-0.5), ('still', 0.0))
    ]
    found = slopes(coordinates, 2)
    assert math.isnan(found.pop('still'))
    for name, slope in (('flat', 0.0), ('growing', 1.0), ('halving', -0.5)):
        np.testing.assert_allclose(found.pop(name), slope, atol=1e-12)
    assert found == {}
    assert math.isnan(slopes(coordinates[:8], 1)['flat'])


@pytest.mark.slow
@pytest.mark.parametrize('mup', [True, False])
def test_experts_and_their_router_are_flat_under_mup(mup):
    # All are chosen: of a few tokens those that change experts are a matter of chance, and hide the rest.
    layer = dataclasses.replace(LAYER, feed_forward=MoeConfig(4, 4, FeedForwardConfig(32)))
    found = measured('adamw', (64, 512), mup=mup, layer=layer)
    assert all(abs(slope) < 0.15 for slope in found.values()) == mup, found
