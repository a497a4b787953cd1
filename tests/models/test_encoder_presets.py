"""Presets of encoders and encoder-decoders: published sizes, which transformers gives too, and full declarations."""

import dataclasses
from pathlib import Path

import pytest

from llm.configuration import load_job
from llm.models.parameters import Role, count_parameters, named_specs, parameter_specs

FOLDER = Path(__file__).parents[2] / 'gin_configs' / 'models'
AXES = {'vocab', 'embed', 'embedding', 'heads', 'kv_heads', 'head_dim', 'mlp', 'layers', 'remainder', 'positions'} | {
    'buckets',
    'token_types',
    'pooled',
    'classes',
}
# As the weights that the authors released add up to.
ENCODERS = {
    'bert_base': 110_106_428,
    'bert_large': 336_226_108,
    'roberta_base': 124_697_433,
    'albert_base': 11_221_680,
    'longformer_base_4096': 148_711_257,
    'encoder_tiny': None,
}
ENCODER_DECODERS = {
    't5_small': 60_506_624,
    't5_base': 222_903_552,
    't5_large': 737_668_096,
    't5_3b': 2_851_598_336,
    't5_11b': 11_307_321_344,
    't5_v1_1_small': 76_961_152,
    't5_v1_1_base': 247_577_856,
    't5_v1_1_large': 783_150_080,
    't5_v1_1_xl': 2_849_757_184,
    't5_v1_1_xxl': 11_135_332_352,
    't5_tiny': None,
}
JOB = """
from __gin__ import dynamic_registration
from llm.models import {module}
from tests.models import preset_job
JOB = @preset_job.HoldAny()
preset_job.HoldAny.model = @{module}.{config}()
"""


@pytest.fixture(scope='module')
def presets(tmp_path_factory):
    found, folder = {}, tmp_path_factory.mktemp('presets')
    for names, module, config in (
        (ENCODERS, 'encoder', 'EncoderConfig'),
        (ENCODER_DECODERS, 'encoder_decoder', 'EncoderDecoderConfig'),
    ):
        job = folder / f'{module}.gin'
        job.write_text(JOB.format(module=module, config=config))
        found |= {name: load_job([str(FOLDER / f'{name}.gin'), str(job)])[0].model for name in names}
    return found


@pytest.mark.parametrize('name', [name for name, size in (ENCODERS | ENCODER_DECODERS).items() if size])
def test_parameters_are_as_many_as_published(presets, name):
    assert count_parameters(parameter_specs(presets[name].build())) == (ENCODERS | ENCODER_DECODERS)[name]
    assert f'{(ENCODERS | ENCODER_DECODERS)[name]:,}' in (FOLDER / f'{name}.gin').read_text().splitlines()[0]


@pytest.mark.oracle
def test_transformers_counts_the_same():
    import torch
    import transformers

    def total(model, config, **settings):
        with torch.device('meta'):
            found = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return sum(x.numel() for x in found.parameters())

    large = {'hidden_size': 1024, 'num_hidden_layers': 24, 'num_attention_heads': 16, 'intermediate_size': 4096}
    assert total('BertForPreTraining', 'BertConfig') == ENCODERS['bert_base']
    assert total('BertForPreTraining', 'BertConfig', **large) == ENCODERS['bert_large']
    roberta = {'vocab_size': 50_265, 'max_position_embeddings': 514, 'type_vocab_size': 1}
    assert total('RobertaForMaskedLM', 'RobertaConfig', **roberta) == ENCODERS['roberta_base']
    longformer = roberta | {'max_position_embeddings': 4098, 'attention_window': 512}
    assert total('LongformerForMaskedLM', 'LongformerConfig', **longformer) == ENCODERS['longformer_base_4096']
    albert = {'hidden_size': 768, 'num_attention_heads': 12, 'intermediate_size': 3072}
    assert total('AlbertForMaskedLM', 'AlbertConfig', **albert) == ENCODERS['albert_base']
    xxl = {'d_model': 4096, 'd_kv': 64, 'd_ff': 10_240, 'num_layers': 24, 'num_heads': 64}
    # transformers ties the output projection to the embedding, also where the released weights do not.
    head = 4096 * 32_128
    gated = total('T5ForConditionalGeneration', 'T5Config', **xxl, feed_forward_proj='gated-gelu')
    assert gated + head == ENCODER_DECODERS['t5_v1_1_xxl']
    assert total('T5ForConditionalGeneration', 'T5Config') == ENCODER_DECODERS['t5_small']


@pytest.mark.parametrize('name', [*ENCODERS, *ENCODER_DECODERS])
def test_every_parameter_is_fully_declared(presets, name):
    for path, spec in named_specs(parameter_specs(presets[name].build())):
        assert len(spec.axes) == len(spec.shape), path
        assert set(spec.axes) <= AXES, path
        assert not set(spec.inputs) & set(spec.outputs), path
        batch = set(range(len(spec.shape))) - set(spec.inputs) - set(spec.outputs)
        assert batch == ({0} if spec.axes[0] in ('layers', 'remainder') else set()), path
        assert bool(spec.inputs) == (spec.role is not Role.VECTOR), path
        assert (spec.constant is None) == (spec.role is not Role.VECTOR), path


@pytest.mark.parametrize('name', ['bert_base', 'albert_base', 't5_small', 't5_v1_1_small'])
def test_fan_in_grows_with_the_width_for_hidden_and_output_parameters_alone(presets, name):
    config = presets[name]
    specs = named_specs(parameter_specs(config.build()))
    base = dict(named_specs(parameter_specs(config.at_width(config.d_model // 2).build())))
    assert [path for path, _ in specs] == list(base)
    for path, spec in specs:
        if path.startswith('widen'):  # from the width of the embeddings, which stays
            assert spec.fan_in == base[path].fan_in
        elif spec.role in (Role.HIDDEN, Role.OUTPUT):
            assert spec.fan_in == 2 * base[path].fan_in, path
        elif spec.role is Role.EMBEDDING:
            assert spec.fan_in == base[path].fan_in, path


def test_presets_are_the_models_of_the_papers(presets):
    small, first = presets['t5_v1_1_small'], presets['t5_small']
    assert not small.tied_embeddings and first.tied_embeddings
    assert [x.feed_forward.activation for x in (small.pattern[0], first.pattern[0])] == ['geglu', 'relu']
    assert not small.encoder.pattern[0].mixer.causal and small.decoder.pattern[0].mixer.causal
    albert = presets['albert_base']
    unshared = dataclasses.replace(albert, layers=dataclasses.replace(albert.layers, shared_layers=False))
    counts = [count_parameters(parameter_specs(x.build())) for x in (albert, unshared)]
    assert counts[1] - counts[0] == 11 * 7_087_872  # a layer of BERT base
