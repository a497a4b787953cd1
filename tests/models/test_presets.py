"""The presets of gin_configs/models: published sizes, and what holds for every parameter of every one."""

import dataclasses
import re
from pathlib import Path

import pytest

from llm.configuration import load_job
from llm.models.attention import AttentionConfig
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.parameters import Role, count_parameters, named_specs, parameter_specs

FOLDER = Path(__file__).parents[2] / 'gin_configs' / 'models'


def _text(path: Path) -> str:
    """Of a preset and those that it includes."""
    text = path.read_text()
    return text + ''.join(_text(FOLDER / name) for name in re.findall(r"include 'gin_configs/models/(.*)'", text))


PRESETS = sorted(path.stem for path in FOLDER.glob('*.gin') if 'decoder.DecoderConfig' in _text(path))
AXES = {'vocab', 'embed', 'heads', 'kv_heads', 'head_dim', 'mlp', 'layers', 'remainder', 'positions'}
AXES |= {'experts', 'routes', 'latent'}
AXES |= {'convolution', 'dt_rank', 'state', 'groups'}

# As published, or as the weights that the authors released add up to.
PUBLISHED = {
    'gpt2_124m': 124_439_808,
    'llama2_7b': 6_738_415_616,
    'llama3_8b': 8_030_261_248,
    'llama3_70b': 70_553_706_496,
    'mistral_7b': 7_241_732_096,
    'gemma2_2b': 2_614_341_888,
    'gemma2_9b': 9_241_705_984,
    'mixtral_8x7b': 46_702_792_704,
    'qwen3_30b_a3b': 30_532_122_624,
    'olmoe_7b': 6_919_161_856,
    'deepseek_v2_lite': 15_706_484_224,
    'jamba_v0_1': 51_570_323_328,
    'mamba_130m': 129_135_360,
    'mamba_370m': 371_516_416,
    'mamba_790m': 793_204_224,
    'mamba_1_4b': 1_372_178_432,
    'mamba_2_8b': 2_768_345_600,
    'mamba2_130m': 128_989_632,
    'mamba2_370m': 368_346_624,
    'mamba2_780m': 780_161_280,
    'mamba2_1_3b': 1_343_757_312,
    'mamba2_2_7b': 2_702_599_680,
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
    'transformer_xl_41m': 41_066_496,
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
    assert set(PRESETS) - set(PUBLISHED) == {'tiny', 'tiny_moe', 'small_cpu', 'jamba_like'}


@pytest.mark.parametrize('name', PRESETS)
def test_every_parameter_is_fully_declared(presets, name):
    for path, spec in named_specs(parameter_specs(Decoder(presets[name]))):
        assert len(spec.axes) == len(spec.shape), path
        assert set(spec.axes) <= AXES, path
        assert not set(spec.inputs) & set(spec.outputs), path
        batch = set(range(len(spec.shape))) - set(spec.inputs) - set(spec.outputs)
        assert {spec.axes[i] for i in batch} <= {'layers', 'remainder', 'experts'}, path
        vector = spec.role is Role.VECTOR
        # The taps of a convolution are its fan-in, the same at every width.
        assert bool(spec.inputs) == (not vector or 'convolution' in spec.axes), path
        assert vector or spec.constant is None, path
        assert not vector or spec.constant is not None or spec.start is not None, path


@pytest.mark.parametrize('name', PRESETS)
def test_base_shapes_of_mup_have_the_same_parameters(presets, name):
    config = presets[name]
    specs = named_specs(parameter_specs(Decoder(config)))
    heads = (layer.mixer.num_kv_heads for layer in config.pattern if isinstance(layer.mixer, AttentionConfig))
    ratio = min(4, *heads, 4)  # small_cpu has two heads
    base = dict(named_specs(parameter_specs(Decoder(config.at_width(config.d_model // ratio)))))
    assert [path for path, _ in specs] == list(base)
    for path, spec in specs:
        if spec.role in (Role.HIDDEN, Role.OUTPUT, Role.ROUTER):
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
