import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from llm.models.attention import AttentionConfig
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.encoder_decoder import EncoderDecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.mamba import MambaConfig
from llm.models.multi_token import MultiTokenConfig
from llm.models.normalization import NormConfig
from llm.models.parameters import ParameterSpec, parameter_specs
from llm.models.recurrent_attention import RecurrentAttentionConfig
from llm.models.stack import StackConfig
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.scaling.accounting import (
    RowTokens,
    bytes_per_device,
    count,
    flops_per_token,
    measured_cpu_flops,
    mfu,
    peak_flops,
    training_memory,
)

LAYER_NORM = NormConfig(kind='layer', bias=True)


def gpt2_124m() -> DecoderConfig:
    """Radford et al. 2019, table 2, first row."""
    attention = AttentionConfig(num_heads=12, num_kv_heads=12, head_dim=64, qkv_bias=True, output_bias=True)
    feed_forward = FeedForwardConfig(d_ff=3072, activation='gelu_tanh', bias=True)
    return DecoderConfig(
        vocab_size=50257,
        d_model=768,
        num_layers=12,
        pattern=(LayerConfig(attention, feed_forward, norm=LAYER_NORM),),
        final_norm=LAYER_NORM,
        position='learned',
        max_positions=1024,
        tied_embeddings=True,
    )


def llama2_7b() -> DecoderConfig:
    """Touvron et al. 2023."""
    layer = LayerConfig(AttentionConfig(32, 32, 128), FeedForwardConfig(11008))
    return DecoderConfig(vocab_size=32000, d_model=4096, num_layers=32, pattern=(layer,))


def specs_of(config: DecoderConfig) -> dict:
    return parameter_specs(Decoder(config))


def test_gpt2_124m_by_hand():
    config = gpt2_124m()
    parameters = count(config, specs_of(config))
    assert parameters.total == 124_439_808
    assert parameters.non_embedding == 124_439_808 - 50257 * 768 - 1024 * 768

    flops = flops_per_token(config, specs_of(config), RowTokens(1024))
    assert flops.parameters == 2 * (12 * 12 * 768**2 + 50257 * 768) == 247_064_064
    assert flops.attention == 12 * 2 * (2 * 1024 * 768) == 37_748_736
    assert flops.causal_attention == 12 * 2 * (2 * 512.5 * 768) == 18_892_800
    # PaLM, appendix B: 6 N + 12 L H Q T, with N the parameters that a token is multiplied with.
    assert flops.training(causal=False) == 6 * 123_532_032 + 12 * 12 * 12 * 64 * 1024 == 854_438_400
    assert flops.training(causal=True) == 3 * (247_064_064 + 18_892_800)


def test_mamba_by_hand():
    """Every scalar of a state is multiplied and added three times a token: decayed, written to, read."""
    config = DecoderConfig(100, 16, 3, (LayerConfig(MambaConfig(32, 2, 4), None),), position='none')
    flops = flops_per_token(config, specs_of(config), RowTokens(64))
    assert flops.recurrence == 3 * 6 * 32 * 4
    # In, gate and out; time steps, b and c; time steps up; the head.
    assert flops.parameters == 2 * (3 * (3 * 16 * 32 + 32 * (2 + 4 + 4) + 2 * 32) + 16 * 100)
    assert flops.attention == flops.causal_attention == 0
    assert flops.training(causal=True) == 3 * (flops.parameters + flops.recurrence)


def test_llama2_7b_by_hand():
    config = llama2_7b()
    parameters = count(config, specs_of(config))
    assert parameters.total == 6_738_415_616
    assert parameters.non_embedding == 6_738_415_616 - 2 * 32000 * 4096

    flops = flops_per_token(config, specs_of(config), RowTokens(4096))
    assert flops.parameters == 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096) == 13_214_154_752
    assert flops.attention == 32 * 4 * 4096 * 4096 == 2_147_483_648
    assert flops.causal_attention == 32 * 4 * 4096 * 2048.5
    assert flops.forward(causal=False) == 15_361_638_400


@pytest.mark.parametrize(('window', 'length'), [(None, 7), (3, 7), (1, 7), (9, 7), (4, 4)])
def test_attention_counts_the_keys_of_the_mask(window, length):
    layers = tuple(LayerConfig(AttentionConfig(2, 1, 4, window=w), FeedForwardConfig(8)) for w in (window, None))
    config = DecoderConfig(vocab_size=16, d_model=8, num_layers=3, pattern=layers)
    t = np.arange(length)
    distance = t[:, None] - t[None, :]
    windowed = ((distance >= 0) & (distance < (window or length))).sum() / length
    causal = (distance >= 0).sum() / length
    flops = flops_per_token(config, specs_of(config), RowTokens(length))
    # Layers 0 and 2 have the window, layer 1 has none.
    assert flops.causal_attention == pytest.approx(4 * 2 * 4 * (2 * windowed + causal), rel=1e-12)
    assert flops.attention == 4 * 2 * 4 * (2 * min(window or length, length) + length)


def test_multi_token_prediction_multiplies_with_the_output_projection_again():
    layer = LayerConfig(AttentionConfig(2, 1, 4), FeedForwardConfig(8))
    plain = DecoderConfig(vocab_size=16, d_model=8, num_layers=3, pattern=(layer,), tied_embeddings=True)
    config = dataclasses.replace(plain, multi_token=MultiTokenConfig(2))
    before, after = (flops_per_token(each, specs_of(each), RowTokens(7)) for each in (plain, config))
    products = 8 * 8 * 2 + 2 * 8 * 4 + 8 * 8 * 3  # query and output, key and value, feed-forward
    assert after.parameters - before.parameters == 2 * 2 * (16 * 8 + 2 * 8 * 8 + products)
    assert after.attention / before.attention == 5 / 3
    assert count(config, specs_of(config)).active == count(config, specs_of(config)).total


def trained_flops(config, loss) -> float:
    """What the compiler counts of the gradient of `loss(module)` with respect to the parameters."""
    module = config.build()
    graph, _ = nnx.split(module)
    shapes = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32),
        parameter_specs(module),
        is_leaf=lambda node: isinstance(node, ParameterSpec),
    )

    def gradient(parameters):
        return jax.grad(lambda parameters: loss(nnx.merge(graph, parameters)))(parameters)

    return jax.jit(gradient).lower(shapes).compile().cost_analysis()['flops']


BATCH, WIDTH, V = 2, 256, 512
HEADS = {'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 64, 'implementation': 'reference'}
UNROLLED = {'num_layers': 2, 'scan_layers': False}


def decoder_case(activation, tied):
    layer = LayerConfig(AttentionConfig(**HEADS), FeedForwardConfig(1024, activation))
    config = DecoderConfig(V, WIDTH, pattern=(layer,), tied_embeddings=tied, **UNROLLED)
    ids = np.zeros((BATCH, 128), np.int32)
    return config, RowTokens(128), lambda module: jnp.sum(jnp.square(module(ids))), 0


def encoder_case():
    """Logits of a quarter of the tokens, of a factorized embedding; a pair of texts; repeats of one layer."""
    layer = LayerConfig(AttentionConfig(**HEADS, causal=False), FeedForwardConfig(1024, 'relu', bias=True))
    stack = StackConfig(pattern=(layer,), shared_layers=True, **UNROLLED)
    config = EncoderConfig(
        V, WIDTH, stack, embedding_size=192, position='none', pooler=True, next_sentence=True, token_types=2
    )
    ids, index = np.zeros((BATCH, 128), np.int32), np.zeros((BATCH, 32), np.int32)

    def loss(module):
        hidden, pairs, _ = module.hidden_and_pair_logits(ids, predicted=index)
        return jnp.sum(jnp.square(module.projection()(hidden))) + jnp.sum(jnp.square(pairs))

    return config, RowTokens(128, predicted=32, pair=True), loss, 0


def encoder_decoder_case():
    """A decoder that reads a third of what the encoder does."""
    mixer = AttentionConfig(**HEADS, causal=False)
    layer = LayerConfig(mixer, FeedForwardConfig(1024, 'geglu'))
    writing = dataclasses.replace(layer, mixer=dataclasses.replace(mixer, causal=True), cross=mixer)
    stacks = (StackConfig(pattern=(each,), **UNROLLED) for each in (layer, writing))
    config = EncoderDecoderConfig(V, WIDTH, *stacks, position='none')
    read, written = np.zeros((BATCH, 144), np.int32), np.zeros((BATCH, 48), np.int32)
    return config, RowTokens(144, decoder=48), lambda module: jnp.sum(jnp.square(module(written, read))), 0


def recurrent_case():
    """Positions, which have no gradient, are multiplied once for both rows; what is remembered has none either."""
    heads = HEADS | {'num_kv_heads': 4}
    layer = LayerConfig(RecurrentAttentionConfig(**heads, memory_length=64), FeedForwardConfig(1024, 'relu'))
    config = DecoderConfig(V, WIDTH, pattern=(layer,), position='none', **UNROLLED)
    ids, positions = np.zeros((BATCH, 128), np.int32), np.arange(128, 256)[None].repeat(BATCH, 0)

    def loss(module):
        memory = config.init_memory(BATCH)
        hidden, _, _ = module.hidden_sums_and_memory(ids, memory, positions=positions)
        return jnp.sum(jnp.square(module.projection()(hidden)))

    kernel = WIDTH * 4 * 64
    of_positions, of_remembered = 2 * 2 * 192 * 2 * kernel, 2 * 2 * BATCH * 64 * 2 * kernel
    return config, RowTokens(128), loss, of_positions - of_remembered


@pytest.mark.parametrize(
    ('case', 'arguments'),
    [
        (decoder_case, ('swiglu', True)),
        (decoder_case, ('relu', False)),
        (encoder_case, ()),
        (encoder_decoder_case, ()),
        (recurrent_case, ()),
    ],
)
def test_agrees_with_the_compiler(case, arguments):
    config, row, loss, left_out = case(*arguments)
    flops = flops_per_token(config, parameter_specs(config.build()), row)
    expected = BATCH * row.text * flops.training(causal=False) + left_out
    # The compiler also counts what is no matrix product, and multiplies masked scores too: a little more than ours.
    # (Of a loop, as in the chunked attention, it counts one turn.)
    assert 1 <= trained_flops(config, loss) / expected < 1.02


def test_memory_is_counted_per_device():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    parameters = {'a': array((8, 6), jnp.float32, 'fsdp'), 'b': array((5,), jnp.bfloat16)}
    optimizer = {'mu': parameters, 'nu': parameters, 'count': array((), jnp.int32)}
    assert bytes_per_device(parameters) == 2 * 6 * 4 + 5 * 2
    memory = training_memory(parameters, optimizer)
    assert (memory.parameters, memory.gradients, memory.optimizer) == (58, 58, 120)
    assert memory.total == 236


def test_memory_of_real_arrays_is_what_their_shards_hold():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    array = jax.device_put(jnp.zeros((16, 3)), NamedSharding(mesh, PartitionSpec('fsdp')))
    assert bytes_per_device(array) == array.addressable_shards[0].data.nbytes
    assert bytes_per_device(jax.ShapeDtypeStruct((16, 3), jnp.float32)) == array.nbytes


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ('topology', 'teraflops'),
    [
        ('v2:2x2', 4 * 45),
        ('v3:2x2', 4 * 123),
        ('v4:2x2x1', 4 * 275),
        ('v5e:2x2', 4 * 197),
        ('v5p:2x2x1', 4 * 459),
        ('v6e:2x2', 4 * 918),
        ('tpu7x:2x2x1', 4 * 2307),
    ],
)
def test_peak_of_four_tpu_chips(topology, teraflops):
    """Devices as the TPU compiler describes them, one or two to a chip."""
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    assert peak_flops(devices) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    ('kind', 'teraflops'),
    [
        ('NVIDIA A100-SXM4-40GB', 312),
        ('NVIDIA H100 80GB HBM3', 989),
        ('NVIDIA H100 PCIe', 756),
        ('NVIDIA H100 NVL', 835),
        ('NVIDIA H200', 989),
        ('NVIDIA GH200 480GB', 989),
        ('NVIDIA H200 MIG 1g.18gb', 0),
        ('NVIDIA RTX A1000', 0),
        ('NVIDIA H20', 0),
    ],
)
def test_peak_of_gpus(kind, teraflops):
    device = types.SimpleNamespace(platform='gpu', device_kind=kind, process_index=0)
    assert peak_flops([device, device]) == 2 * teraflops * 1e12


def test_unknown_device_makes_the_peak_unknown():
    known, unknown = (
        types.SimpleNamespace(platform='gpu', device_kind=kind, process_index=0) for kind in ('NVIDIA H200', 'Other')
    )
    assert peak_flops([known, unknown]) == 0


def test_simulated_cpu_devices_share_one_processor():
    assert peak_flops(jax.devices()) == peak_flops(jax.devices()[:1]) == measured_cpu_flops() > 1e8


def test_mfu():
    assert mfu(1000, 6e9, 12e12) == pytest.approx(0.5)
