"""Every family against transformers: logits, loss, gradients, greedy decoding, and our export as it is read there."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm.inference.generation import Generator, Prompt
from llm.inference.sampling import SamplingConfig
from llm.interop.huggingface.directory import family_links, open_directory, write_directory
from llm.interop.huggingface.families import FAMILIES
from llm.interop.loading import load_parameters
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.parameters import named_specs
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules
from tests.interop.huggingface import encoder_models, models
from tests.models.small_decoders import compiled

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures('compiled_quickly')]

ONE = MeshConfig(data=1)
TOLERANCE = 1e-4


@functools.cache
def imported(name: str) -> tuple[Any, dict[str, Any]]:
    """The checkpoint of a case, and our parameters on one device."""
    checkpoint = open_directory(models.make(name)[1])
    return checkpoint, load_parameters(checkpoint.pieces, checkpoint.specs, make_mesh(ONE), AxisRules())


def leaf(tree: Any, path: str) -> Any:
    """The array at 'a/b/c'."""
    return functools.reduce(lambda node, key: node[key], path.split('/'), tree)


def value_and_gradient(config: DecoderConfig, params: Any, inputs: np.ndarray) -> tuple[Any, Any]:
    """((mean loss of the next tokens, logits), gradient)."""
    graph, _ = nnx.split(Decoder(config))

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graph, params)(inputs)
        likelihoods = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), inputs[:, 1:, None], axis=-1)
        return -likelihoods.mean(), logits

    return compiled(jax.value_and_grad(loss, has_aux=True))(params)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference, by their largest value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / max(np.abs(theirs).max(), 1e-30))


@pytest.mark.parametrize('name', models.CASES)
def test_logits_loss_and_gradients(name):
    import torch

    oracle, _ = models.make(name)
    checkpoint, params = imported(name)
    inputs = models.token_ids()
    ids = torch.from_numpy(inputs).long()
    theirs = oracle(ids, labels=ids)
    oracle.zero_grad()
    theirs.loss.backward()
    (loss, logits), gradient = value_and_gradient(checkpoint.config, params, inputs)
    assert relative(logits, theirs.logits.detach().numpy()) < TOLERANCE
    assert float(loss) == pytest.approx(theirs.loss.item(), rel=TOLERANCE)

    # Their gradients by the names of their files: transformers calls the head of GPT-NeoX otherwise in memory.
    neox = oracle.config.model_type == 'gpt_neox'
    named = models.by_file_names(
        oracle,
        {
            key.replace('lm_head', 'embed_out') if neox else key: parameter.grad.numpy()
            for key, parameter in oracle.named_parameters()
        },
    )
    ours = {key: np.zeros_like(array) for key, array in named.items()}
    for link in family_links(checkpoint.family, checkpoint.config, checkpoint.specs):
        link.write(ours[link.name], np.asarray(leaf(gradient, link.path)[link.index]))
    for key, expected in named.items():
        assert relative(ours[key], expected) < TOLERANCE, key
        assert np.linalg.norm(ours[key]) == pytest.approx(np.linalg.norm(expected), rel=TOLERANCE), key


@pytest.mark.parametrize('name', [name for name, case in models.CASES.items() if case.decodes])
def test_greedy_decoding(name):
    import torch

    oracle, _ = models.make(name)
    checkpoint, params = imported(name)
    prompts, new = models.token_ids(2, 17), 10
    ids = torch.from_numpy(prompts).long()
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, oracle(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    generator = Generator(checkpoint.config, SamplingConfig(temperature=0.0), make_mesh(ONE), tokens_per_call=16)
    decoding = generator.start(params, [Prompt(tuple(map(int, prompt))) for prompt in prompts], new)
    rows: list[list[int]] = [[], []]
    for made in decoding:
        rows = [row + more for row, more in zip(rows, made, strict=True)]
    assert rows == ids[:, 17:].tolist()


@pytest.mark.parametrize('name', models.CASES)
def test_export_loads_in_transformers_with_the_same_logits(name, tmp_path):
    import torch

    oracle, _ = models.make(name)
    checkpoint, params = imported(name)
    write_directory(
        tmp_path,
        checkpoint.config,
        lambda path, index: np.asarray(leaf(params, path)[index]),
        dtype='float32',
        shard_bytes=20_000,
        sequence_length=checkpoint.sequence_length,
        extra_settings=models.TOKENS,
    )
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    ids = torch.from_numpy(models.token_ids()).long()
    with torch.no_grad():
        expected = oracle(ids).logits.numpy()
        assert relative(models.load(tmp_path)(ids).logits.numpy(), expected) < 1e-6
    # And the same model for us, whichever family came first to describe it.
    again = open_directory(tmp_path)
    assert again.config == checkpoint.config


def test_every_family_is_compared_with_transformers():
    compared = {models.make(name)[0].config.model_type for name in models.CASES}
    compared |= {encoder_models.make(name)[0].config.model_type for name in encoder_models.CASES}
    assert compared == set(FAMILIES)


@pytest.mark.parametrize('mesh', [MeshConfig(fsdp=4, tensor=2), MeshConfig(fsdp=2, pipeline=2, tensor=2)])
def test_import_onto_a_mesh_gives_the_parameters_of_one_device(mesh):
    for name in ('llama', 'gemma3', 'gpt_neox', 'phi3'):
        checkpoint, params = imported(name)
        placed = load_parameters(checkpoint.pieces, checkpoint.specs, make_mesh(mesh), AxisRules())
        assert any(not array.is_fully_replicated for array in jax.tree.leaves(placed))
        jax.tree.map(np.testing.assert_array_equal, placed, params)
        assert [array.shape for array in jax.tree.leaves(placed)] == [s.shape for _, s in named_specs(checkpoint.specs)]
