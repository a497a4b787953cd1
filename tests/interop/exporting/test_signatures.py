"""What programs a model has, and which models have none."""

import dataclasses

import pytest

from llm.errors import UserError
from llm.interop.exporting.signatures import check, signatures
from llm.interop.exporting.writing import check_exportable
from llm.models.position import RotaryScaling
from tests.interop.exporting import small_models


def test_arrays_are_named_with_the_sizes_that_vary():
    logits, decode = signatures(small_models.configs()['mamba'])
    assert [(each.name, each.shape) for each in logits.inputs] == [('tokens', ('batch', 'length'))]
    assert [(each.name, each.shape) for each in decode.inputs[3:]] == [
        ('cache_layers_0_convolution', (2, 'batch', 3, 32)),
        ('cache_layers_0_state', (2, 'batch', 4, 32)),
    ]
    assert [each.name for each in decode.outputs] == ['logits', *(f'new_{each.name}' for each in decode.inputs[3:])]
    whole, encode, decode = signatures(small_models.configs()['t5'])
    assert [each.name for each in whole.inputs] == ['tokens', 'encoder_tokens', 'encoder_lengths']
    memory = encode.outputs[1:]
    assert memory[0].shape == (2, 'batch', 'encoder_length', 4, 8)
    assert [each.name for each in memory] == ['memory_layers_0_cross_key', 'memory_layers_0_cross_value']
    # The memory is read and not given back.
    assert decode.inputs[3:6] == (encode.inputs[1], *memory)
    assert [each.name for each in decode.outputs] == ['logits', *(f'new_{each.name}' for each in decode.inputs[6:])]
    assert decode.inputs[6].shape == (2, 'batch', 'room', 4, 8)


def test_models_that_need_to_know_sizes_are_refused_by_name():
    config = small_models.configs()['llama']
    (layer,) = config.pattern
    mixer = dataclasses.replace(layer.mixer, rotary_scaling=RotaryScaling('dynamic', 2.0, 16))
    slowed = dataclasses.replace(config, pattern=(dataclasses.replace(layer, mixer=mixer),))
    with pytest.raises(UserError, match="rotary scaling 'dynamic' depends on the length"):
        check(slowed)
    (layer,) = small_models.configs()['mixtral'].pattern
    experts = dataclasses.replace(layer.feed_forward, dispatch='capacity')
    with pytest.raises(UserError, match='experts with a capacity'):
        check(dataclasses.replace(config, pattern=(dataclasses.replace(layer, feed_forward=experts),)))
    with pytest.raises(UserError, match="compute_dtype is 'float64'"):
        check(dataclasses.replace(config, compute_dtype='float64'))
    with pytest.raises(UserError, match='platforms are'):
        check_exportable(config, 'jax_export', ('abacus',))
