"""Hugging Face directories: the stored references, checkpoints that are not as they should be, refused exports."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from llm.configuration import load_job
from llm.errors import UserError
from llm.interop.huggingface.directory import family_links, find_family, open_directory
from llm.interop.loading import load_parameters
from llm.interop.safetensors import SINGLE, open_checkpoint
from llm.interop.safetensors_writing import NewTensor, write_checkpoint
from llm.models.position import RotaryScaling
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules
from tests.interop.huggingface import models
from tests.interop.huggingface.test_families import leaf, relative, value_and_gradient
from tests.models.small_decoders import decoder_config, layer
from tests.models.test_presets import FOLDER, JOB

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize('name', ['gpt2', 'mamba1'])
def test_stored_logits_loss_and_gradient_norms(name, dev_data):
    folder = dev_data / 'oracles' / name
    reference = np.load(folder / 'ref.npz')
    expected = json.loads((folder / 'ref.json').read_text())
    checkpoint = open_directory(folder)
    params = load_parameters(checkpoint.pieces, checkpoint.specs, make_mesh(MeshConfig(data=1)), AxisRules())
    (loss, logits), gradient = value_and_gradient(checkpoint.config, params, reference['input_ids'].astype(np.int32))
    assert relative(logits, reference['logits']) < 1e-4
    assert float(loss) == pytest.approx(expected['loss'], rel=1e-5)
    squares: dict[str, float] = {}
    for link in family_links(checkpoint.family, checkpoint.config, checkpoint.specs):
        piece = np.asarray(leaf(gradient, link.path)[link.index], np.float64)
        squares[link.name] = squares.get(link.name, 0.0) + float(np.sum(piece**2))
    norms = {name: square**0.5 for name, square in squares.items()}
    assert norms == pytest.approx(expected['grad_norms'], rel=1e-4)


@pytest.fixture
def llama(tmp_path) -> Path:
    """A copy of a checkpoint, to be spoilt."""
    return Path(shutil.copytree(models.make('llama')[1], tmp_path / 'llama'))


def change_settings(directory: Path, **changes) -> None:
    """Set settings of config.json; None deletes one."""
    settings = json.loads((directory / 'config.json').read_text()) | changes
    (directory / 'config.json').write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))


def change_tensors(directory: Path, change) -> None:
    """Write the tensors again after `change` of the dict of arrays."""
    arrays = {name: np.array(tensor.read()) for name, tensor in open_checkpoint(directory).items()}
    change(arrays)
    new = [NewTensor(name, x.shape, 'F32', lambda x=x: x) for name, x in arrays.items()]
    (directory / SINGLE).unlink()
    write_checkpoint(directory, new, 10**9)


Q = 'model.layers.1.self_attn.q_proj.weight'


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda t: t.update(extra=np.zeros(3, np.float32)), 'extra is unknown'),
        (lambda t: t.pop(Q), f'{Q} is missing'),
        (lambda t: t.update({Q: t[Q].T.copy()}), rf'{Q} has shape \[32, 24\], not \[24, 32\]'),
        (lambda t: t.update({Q[:-6] + 'bias': np.zeros(24, np.float32)}), f'{Q[:-6]}bias is unknown'),
        (lambda t: t.update({Q.replace('.1.', '.7.'): t[Q]}), r'model\.layers\.7\.self_attn.* is unknown'),
    ],
)
def test_tensors_that_do_not_belong_are_named(llama, change, message):
    change_tensors(llama, change)
    with pytest.raises(UserError, match=message):
        open_directory(llama)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model_type': 'mamba9'}, "model_type is 'mamba9'"),
        ({'architectures': ['LlamaForSequenceClassification']}, 'architectures is'),
        ({'hidden_act': 'swoosh'}, "hidden_act is 'swoosh': supported are silu"),
        ({'hidden_size': ...}, 'hidden_size is missing'),
        ({'hidden_size': '32'}, "hidden_size is '32': not of type int"),
        ({'num_hidden_layers': -1}, 'num_hidden_layers is -1: use from 1 to 10,000'),
        ({'num_attention_heads': 0, 'head_dim': None}, 'num_attention_heads is 0'),
        ({'num_key_value_heads': 3}, 'num_heads 4 is not divisible by num_kv_heads 3'),
        ({'attention_multiplier': 2.0, 'logits_scaling': 8}, 'attention_multiplier = 2.0, logits_scaling = 8'),
        ({'quantization_config': {'bits': 4}}, "quantization_config is {'bits': 4}"),
        ({'pretraining_tp': 2}, 'pretraining_tp is 2'),
        ({'rope_parameters': {'rope_type': 'su', 'rope_theta': 1e4}}, "rope_type is 'su'"),
        ({'rope_parameters': {'rope_type': 'linear', 'factor': 'two'}}, "factor is 'two'"),
        ({'rope_parameters': {'rope_type': 'linear', 'factor': 2.0, 'spin': 1}}, 'spin is 1'),
        ({'rope_parameters': {'rope_type': 'llama3', 'factor': 8.0}}, 'low_freq_factor is None'),
        ({'rope_parameters': [1]}, 'rope_parameters is'),
        ({'rms_norm_eps': float('nan')}, 'rms_norm_eps is nan'),
    ],
)
def test_settings_that_are_not_supported_are_named(llama, changes, message):
    change_settings(llama, **changes)
    with pytest.raises(UserError, match=message):
        open_directory(llama)


def test_a_setting_known_to_the_user_may_be_passed_over(llama):
    change_settings(llama, unsloth_fixed=True)
    assert open_directory(llama, ('unsloth_fixed',)).config == open_directory(models.make('llama')[1]).config


MAMBA_130M = {'d_inner': 64, 'd_model': 32, 'n_layer': 3, 'fused_add_norm': True, 'rms_norm': True, 'ssm_cfg': {}}
CODESTRAL = {'intermediate_size': 64, 'norm_before_gate': True, 'rms_norm': True, 'time_step_limit': [0.0, math.inf]}
JAMBA_V0_1 = {'mamba_inner_layernorms': True, 'sliding_window': None, 'calc_logits_for_entire_prompt': False}


@pytest.mark.parametrize(('name', 'more'), [('mamba', MAMBA_130M), ('mamba2', CODESTRAL), ('jamba', JAMBA_V0_1)])
def test_settings_of_published_checkpoints_that_transformers_does_not_read(name, more, tmp_path):
    source = models.make(name)[1]
    directory = Path(shutil.copytree(source, tmp_path / name))
    change_settings(directory, **more)
    assert open_directory(directory).config == open_directory(source).config


@pytest.mark.parametrize(
    ('name', 'changes', 'message'),
    [
        ('mamba', {'hidden_act': 'gelu'}, "hidden_act is 'gelu': only 'silu'"),
        ('mamba', {'rms_norm': False}, 'rms_norm is False'),
        ('mamba', {'time_step_rank': 'some'}, "time_step_rank is 'some': not of type int"),
        ('mamba', {'time_step_rank': 'auto'}, r'dt_proj\.weight has shape \[64, 3\], not \[64, 2\]'),
        ('mamba2', {'time_step_limit': [0.001, 0.1]}, r'time_step_limit is \[0.001, 0.1\]: only'),
        ('mamba2', {'expand': 3}, 'expand is 3: 4 heads of 16 are not so many widths'),
        ('mamba2', {'n_groups': 3}, 'num_heads 4 is not divisible by num_groups 3'),
        ('mamba2', {'n_groups': 1}, r'in_proj\.weight has shape \[156, 32\], not \[144, 32\]'),
        ('jamba', {'attn_layer_offset': 3}, 'attn_layer_offset is 3: use from 0 to'),
        ('jamba', {'expert_layer_period': 0}, 'expert_layer_offset is 0: use from 0 to'),
        ('jamba', {'attn_layer_offset': 0}, r'layers\.1\.mamba\.\S+ is missing'),
        ('jamba', {'mamba_inner_layernorms': False}, 'mamba_inner_layernorms is False'),
        ('jamba', {'num_experts': 2**40}, 'num_experts is 1099511627776: use from 1 to 10,000'),
    ],
)
def test_recurrent_models_that_are_not_supported_are_refused_by_name(name, changes, message, tmp_path):
    directory = Path(shutil.copytree(models.make(name)[1], tmp_path / name))
    change_settings(directory, **changes)
    with pytest.raises(UserError, match=message):
        open_directory(directory)


def test_no_memory_is_spent_on_absurd_sizes(llama):
    change_settings(llama, vocab_size=2**50)
    with pytest.raises(UserError, match=r'embed_tokens\.weight has shape \[64, 32\], not \[1125899906842624, 32\]'):
        open_directory(llama)
    change_settings(llama, num_hidden_layers=2**40)
    with pytest.raises(UserError, match='num_hidden_layers is 1099511627776'):
        open_directory(llama)


def test_settings_of_transformers_4_mean_the_same(llama):
    config = open_directory(llama).config
    change_settings(llama, rope_parameters=..., rope_theta=500.0, rope_scaling=None, torch_dtype='float32')
    assert open_directory(llama).config == config
    scaling = {'type': 'linear', 'factor': 4.0}
    change_settings(llama, rope_scaling=scaling)
    assert open_directory(llama).config.pattern[0].mixer.rotary_scaling == RotaryScaling('linear', 4.0)


def test_names_without_prefix_and_a_second_copy_of_a_tied_table(tmp_path):
    source = Path(shutil.copytree(models.make('gpt2')[1], tmp_path / 'gpt2'))

    def shorten(arrays):
        for name in list(arrays):
            arrays[name.removeprefix('transformer.')] = arrays.pop(name)
        arrays['lm_head.weight'] = arrays['wte.weight']
        arrays['h.0.attn.bias'] = np.zeros((1, 1, 40, 40), np.float32)

    expected = open_directory(models.make('gpt2')[1])
    change_tensors(source, shorten)
    found = open_directory(source)
    whole = (slice(None),) * 4
    for name, shape in found.pieces.shapes.items():
        cut = whole[: len(shape)]
        np.testing.assert_array_equal(found.pieces.read(name, cut), expected.pieces.read(name, cut))


def test_export_is_refused_with_what_is_different():
    plain = decoder_config()
    assert find_family(plain)[0].model_type == 'llama'
    with pytest.raises(UserError, match=r'pattern\[0\]\.mixer\.sinks is True, not False'):
        find_family(decoder_config(layer({'sinks': True})))
    with pytest.raises(UserError, match='no gpt2: .*qkv_bias is False, not True'):
        find_family(dataclasses.replace(plain), 'gpt2')
    with pytest.raises(UserError, match='mup_base_width is 8'):
        find_family(dataclasses.replace(plain, mup_base_width=8))
    with pytest.raises(UserError, match="there is no family 'bloom'"):
        find_family(plain, 'bloom')
    # What is not the model's own does not matter.
    assert find_family(dataclasses.replace(plain, remat='full', compute_dtype='bfloat16', scan_layers=False))
    assert find_family(decoder_config(plain.pattern[0], plain.pattern[0]))[0].model_type == 'llama'


PRESETS = {
    'gpt2_124m': 'gpt2',
    'llama2_7b': 'llama',
    'llama3_8b': 'llama',
    'llama3_70b': 'llama',
    'smollm2_135m': 'llama',
    'smollm2_1_7b': 'llama',
    'mistral_7b': 'mistral',
    'gemma2_2b': 'gemma2',
    'gemma2_9b': 'gemma2',
    'gemma3_1b': 'gemma3_text',
    'gemma3_4b': 'gemma3_text',
    'qwen2_0_5b': 'qwen2',
    'qwen2_7b': 'qwen2',
    'qwen3_0_6b': 'qwen3',
    'qwen3_8b': 'qwen3',
    'phi3_mini': 'phi3',
    'phi4': 'phi3',
    'olmo2_1b': 'olmo2',
    'olmo2_7b': 'olmo2',
    'pythia_160m': 'gpt_neox',
    'pythia_1_4b': 'gpt_neox',
    'starcoder2_3b': 'starcoder2',
    'stablelm2_1_6b': 'stablelm',
    'mamba_130m': 'mamba',
    'mamba2_130m': 'mamba2',
    'jamba_v0_1': 'jamba',
}


@pytest.mark.parametrize('preset', PRESETS)
def test_presets_are_models_of_their_families(preset, tmp_path):
    (tmp_path / 'job.gin').write_text(JOB)
    config = load_job([str(FOLDER / f'{preset}.gin'), str(tmp_path / 'job.gin')])[0].model
    assert find_family(config, PRESETS[preset])[0].model_type == PRESETS[preset]
