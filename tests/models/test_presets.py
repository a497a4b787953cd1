"""The presets of gin_configs/models: published sizes, and what holds for every parameter of every one."""

import dataclasses
from pathlib import Path

import pytest

from llm.configuration import load_job
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.parameters import Role, count_parameters, named_specs, parameter_specs

FOLDER = Path(__file__).parents[2] / 'gin_configs' / 'models'
PRESETS = sorted(path.stem for path in FOLDER.glob('*.gin'))
AXES = {'vocab', 'embed', 'heads', 'kv_heads', 'head_dim', 'mlp', 'layers', 'remainder', 'positions'}

# As published, or as the weights that the authors released add up to.
PUBLISHED = {
    'gpt2_124m': 124_439_808,
    'llama2_7b': 6_738_415_616,
    'llama3_8b': 8_030_261_248,
    'llama3_70b': 70_553_706_496,
    'mistral_7b': 7_241_732_096,
    'gemma2_2b': 2_614_341_888,
    'gemma2_9b': 9_241_705_984,
    'gemma3_1b': 999_885_952,
    # The checkpoint's 4,300,079,472 without its vision tower and projector.
    'gemma3_4b': 3_880_263_168,
    'qwen2_0_5b': 494_032_768,
    'qwen2_7b': 7_615_616_512,
    'qwen3_0_6b': 596_049_920,
    'qwen3_8b': 8_190_735_360,
    'phi3_mini': 3_821_079_552,
    'phi4': 14_659_507_200,
    'smollm2_135m': 134_515_008,
    'smollm2_1_7b': 1_711_376_384,
    'olmo2_1b': 1_484_916_736,
    'olmo2_7b': 7_298_617_344,
    'pythia_160m': 162_322_944,
    'pythia_1_4b': 1_414_647_808,
    'starcoder2_3b': 3_030_371_328,
    'stablelm2_1_6b': 1_644_515_328,
}


JOB = """
from __gin__ import dynamic_registration
from llm.models import decoder
from tests.models import preset_job
JOB = @preset_job.Hold()
preset_job.Hold.model = @decoder.DecoderConfig()
"""


@pytest.fixture(scope='module')
def presets(tmp_path_factory) -> dict[str, DecoderConfig]:
    job = tmp_path_factory.mktemp('presets') / 'job.gin'
    job.write_text(JOB)
    return {name: load_job([str(FOLDER / f'{name}.gin'), str(job)])[0].model for name in PRESETS}


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_are_as_many_as_published(presets, name):
    assert count_parameters(parameter_specs(Decoder(presets[name]))) == PUBLISHED[name]


def test_a_preset_with_a_published_size_is_compared_with_it():
    assert set(PRESETS) - set(PUBLISHED) == {'tiny', 'small_cpu'}


@pytest.mark.parametrize('name', PRESETS)
def test_every_parameter_is_fully_declared(presets, name):
    for path, spec in named_specs(parameter_specs(Decoder(presets[name]))):
        assert len(spec.axes) == len(spec.shape), path
        assert set(spec.axes) <= AXES, path
        assert not set(spec.inputs) & set(spec.outputs), path
        batch = set(range(len(spec.shape))) - set(spec.inputs) - set(spec.outputs)
        assert batch == ({0} if spec.axes[0] in ('layers', 'remainder') else set()), path
        assert bool(spec.inputs) == (spec.role is not Role.VECTOR), path
        assert (spec.constant is None) == (spec.role is not Role.VECTOR), path


@pytest.mark.parametrize('name', PRESETS)
def test_base_shapes_of_mup_have_the_same_parameters(presets, name):
    config = presets[name]
    specs = named_specs(parameter_specs(Decoder(config)))
    ratio = min(4, *(layer.mixer.num_kv_heads for layer in config.pattern))  # small_cpu has two heads
    base = dict(named_specs(parameter_specs(Decoder(config.at_width(config.d_model // ratio)))))
    assert [path for path, _ in specs] == list(base)
    for path, spec in specs:
        if spec.role in (Role.HIDDEN, Role.OUTPUT):
            assert spec.fan_in == ratio * base[path].fan_in, path
        elif spec.role is Role.EMBEDDING:
            assert spec.fan_in == base[path].fan_in, path


def test_presets_differ_from_each_other_as_the_papers_say(presets):
    llama2, llama3, mistral = (presets[name] for name in ('llama2_7b', 'llama3_8b', 'mistral_7b'))
    assert llama3.pattern[0].mixer.rotary_base == 500_000 and llama2.pattern[0].mixer.rotary_base == 10_000
    assert dataclasses.replace(llama3.pattern[0].mixer, window=4096, rotary_base=10_000.0) == mistral.pattern[0].mixer
    gemma = presets['gemma2_9b']
    assert [layer.mixer.window for layer in gemma.pattern] == [4096, None]
    assert gemma.repeats == 21 and not gemma.remainder
