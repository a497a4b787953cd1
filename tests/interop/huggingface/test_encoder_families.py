"""Encoders and encoder-decoders against transformers, as test_families.py does for decoders; and a stored BERT."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm.configuration import load_job
from llm.errors import UserError
from llm.inference.generation import Generator, Prompt
from llm.inference.sampling import SamplingConfig
from llm.interop.huggingface.directory import family_links, find_family, open_directory, write_directory
from llm.interop.loading import load_parameters
from llm.models.encoder import Encoder
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules
from llm.training.losses import summed_loss
from tests.interop.huggingface import encoder_models as models
from tests.interop.huggingface.test_directory import change_settings, change_tensors
from tests.interop.huggingface.test_families import ONE, TOLERANCE, leaf, relative
from tests.models.small_decoders import compiled
from tests.models.test_encoder_presets import ENCODER_DECODERS, ENCODERS, FOLDER, JOB

pytestmark = pytest.mark.oracle


@functools.cache
def imported(name: str) -> tuple[Any, dict[str, Any]]:
    """The checkpoint of a case, and our parameters on one device."""
    checkpoint = open_directory(models.make(name)[1])
    return checkpoint, load_parameters(checkpoint.pieces, checkpoint.specs, make_mesh(ONE), AxisRules())


def value_and_gradient(config: Any, params: Any, targets: Any, weights: Any, **inputs: Any) -> Any:
    """((mean loss as training computes it, (logits, states, pooled, whether the next sentence follows)), gradient).

    Heads that there are not give None. The pooler's and its classifier's gradients are of a loss of their sum besides.
    """
    graph, _ = nnx.split(config.build())

    def loss(params: Any) -> Any:
        model = nnx.merge(graph, params)
        if not isinstance(model, Encoder):
            hidden = model.hidden(**inputs)
            states = pooled = follows = None
        else:
            states = model.encode(**inputs)
            hidden = states if model.head is None else model.head(states)
            pooled = model.pooled(states) if config.pooler else None
            follows = model.next_sentence_logits(states) if config.next_sentence else None
        if states is not None and model.head is None:
            return jnp.sum(states * weights[:, :, None]) + jnp.sum(pooled), (None, states, pooled, None)
        value = summed_loss(model.projection(), hidden, targets, weights)[0] / weights.sum()
        if follows is not None:
            value = value - jnp.mean(jax.nn.log_softmax(follows)[:, 0])
        return value, (model.projection()(hidden), states, pooled, follows)

    return compiled(jax.value_and_grad(loss, has_aux=True))(params)


def check_gradients(checkpoint: Any, gradient: Any, oracle: Any) -> None:
    """All of ours against all of theirs, by the names of their files."""
    prefix = checkpoint.family.prefix
    table = family_links(checkpoint.family, checkpoint.config, checkpoint.specs)
    named = {key: x.grad.numpy() for key, x in oracle.named_parameters() if x.grad is not None}
    if not any(key.startswith(prefix) for key in named):
        named = {prefix + key: x for key, x in named.items()}
    ours = {key: np.zeros_like(array) for key, array in named.items()}
    for link in table:
        link.write(ours[link.name], np.asarray(leaf(gradient, link.path)[link.index]))
    assert {link.name for link in table} == set(named)
    for key, expected in named.items():
        if not key.endswith(
            ('key.bias', 'key_global.bias')
        ):  # it shifts all scores of a query alike: its gradient is zero but for rounding
            assert relative(ours[key], expected) < TOLERANCE, key
            assert np.linalg.norm(ours[key]) == pytest.approx(np.linalg.norm(expected), rel=TOLERANCE), key


@pytest.mark.parametrize('name', models.ENCODERS)
def test_logits_heads_loss_and_gradients_of_encoders(name):
    import torch

    oracle, _ = models.make(name)
    checkpoint, params = imported(name)
    settings = oracle.config
    rng = np.random.default_rng(1)
    tokens, real = models.padded(pad=settings.pad_token_id)
    types = np.where((np.arange(tokens.shape[1]) > 5) & real, settings.type_vocab_size - 1, 0)
    targets, weights = rng.integers(0, models.V, tokens.shape), (real & (rng.random(real.shape) < 0.4)).astype('f')
    given = {'attention_mask': torch.tensor(real.astype(int)), 'token_type_ids': torch.tensor(types)}
    labels = torch.tensor(np.where(weights > 0, targets, -100))
    if 'pretraining' in name:
        given['next_sentence_label'] = torch.zeros(len(tokens), dtype=torch.long)
    more = {}
    if name == 'longformer':
        seen = np.zeros(tokens.shape, np.int32)
        seen[0, [0, 11]] = seen[1, [0, 3]] = seen[2, 2] = 1
        given['global_attention_mask'], more['global_tokens'] = torch.tensor(seen), jnp.asarray(seen)
    oracle.zero_grad()
    if checkpoint.config.head is None:
        theirs = oracle(torch.tensor(tokens), **given)
        states = theirs.last_hidden_state
        loss = (states * torch.tensor(weights)[:, :, None]).sum() + theirs.pooler_output.sum()
    else:
        theirs = oracle(torch.tensor(tokens), labels=labels, **given)
        loss = theirs.loss
    loss.backward()
    (value, (logits, states, pooled, follows)), gradient = value_and_gradient(
        checkpoint.config,
        params,
        jnp.asarray(targets),
        jnp.asarray(weights),
        inputs=jnp.asarray(tokens),
        segment_ids=jnp.asarray(real.astype(np.int32)),
        token_types=jnp.asarray(types),
        positions=jnp.arange(tokens.shape[1])[None],
        **more,
    )
    assert float(value) == pytest.approx(loss.item(), rel=TOLERANCE)
    if checkpoint.config.head is None:
        assert relative(np.asarray(states)[real], theirs.last_hidden_state.detach().numpy()[real]) < TOLERANCE
        assert relative(pooled, theirs.pooler_output.detach().numpy()) < TOLERANCE
    else:
        found = theirs.prediction_logits if 'pretraining' in name else theirs.logits
        assert relative(np.asarray(logits)[real], found.detach().numpy()[real]) < TOLERANCE
    if 'pretraining' in name:
        assert relative(follows, theirs.seq_relationship_logits.detach().numpy()) < TOLERANCE
    check_gradients(checkpoint, gradient, oracle)


@pytest.mark.parametrize('name', models.ENCODER_DECODERS)
def test_logits_loss_gradients_and_greedy_decoding_of_encoder_decoders(name):
    import torch

    oracle, _ = models.make(name)
    checkpoint, params = imported(name)
    rng = np.random.default_rng(1)
    sources, real = models.padded()
    targets, weights = rng.integers(2, models.V, (len(sources), 9)), np.ones((len(sources), 9), np.float32)
    weights[1, 6:] = 0
    inputs = np.concatenate([np.zeros((len(sources), 1), int), targets[:, :-1]], axis=1)
    given = {'input_ids': torch.tensor(sources), 'attention_mask': torch.tensor(real.astype(int))}
    oracle.zero_grad()
    theirs = oracle(
        **given, decoder_input_ids=torch.tensor(inputs), labels=torch.tensor(np.where(weights > 0, targets, -100))
    )
    theirs.loss.backward()
    (value, (logits, *_)), gradient = value_and_gradient(
        checkpoint.config,
        params,
        jnp.asarray(targets),
        jnp.asarray(weights),
        inputs=jnp.asarray(inputs),
        segment_ids=jnp.ones(inputs.shape, jnp.int32),
        encoder_inputs=jnp.asarray(sources),
        encoder_segment_ids=jnp.asarray(real.astype(np.int32)),
    )
    assert relative(logits, theirs.logits.detach().numpy()) < TOLERANCE
    assert float(value) == pytest.approx(theirs.loss.item(), rel=TOLERANCE)
    check_gradients(checkpoint, gradient, oracle)

    new, ids = 12, torch.zeros((len(sources), 1), dtype=torch.long)
    with torch.no_grad():
        for _ in range(new):
            found = oracle(**given, decoder_input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, found[:, -1:].argmax(-1)], dim=1)
    generator = Generator(checkpoint.config, SamplingConfig(temperature=0.0), make_mesh(ONE), tokens_per_call=16)
    prompts = [
        Prompt((0,), i, encoder_tokens=tuple(map(int, row[keep])))
        for i, (row, keep) in enumerate(zip(sources, real, strict=True))
    ]
    rows: list[list[int]] = [[] for _ in prompts]
    for made in generator.start(params, prompts, new):
        rows = [row + more for row, more in zip(rows, made, strict=True)]
    assert rows == ids[:, 1:].tolist()
    assert len(np.unique(rows)) > 3


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
        extra_settings={'pad_token_id': None, 'eos_token_id': None},
    )
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    tokens = torch.from_numpy(models.padded(pad=1)[0]).long()
    given = {'decoder_input_ids': tokens[:, :7]} if name in models.ENCODER_DECODERS else {}
    with torch.no_grad():
        again = models.load(tmp_path, models.CASES[name].architecture)(tokens, **given)
        assert relative(again[0].numpy(), oracle(tokens, **given)[0].numpy()) < 1e-6
    assert open_directory(tmp_path).config == checkpoint.config


def test_import_onto_a_mesh_gives_the_parameters_of_one_device():
    for name in models.CASES:
        checkpoint, params = imported(name)
        mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
        jax.tree.map(
            np.testing.assert_array_equal,
            load_parameters(checkpoint.pieces, checkpoint.specs, mesh, AxisRules()),
            params,
        )


def test_the_stored_bert(dev_data):
    folder = dev_data / 'oracles' / 'bert'
    expected, reference = json.loads((folder / 'ref.json').read_text()), np.load(folder / 'ref.npz')
    checkpoint = open_directory(folder)
    params = load_parameters(checkpoint.pieces, checkpoint.specs, make_mesh(ONE), AxisRules())
    tokens = jnp.asarray(reference['input_ids'])
    (loss, (logits, *_)), gradient = value_and_gradient(  # its labels are its inputs
        checkpoint.config, params, tokens, jnp.ones(tokens.shape), inputs=tokens
    )
    assert relative(logits, reference['logits']) < TOLERANCE
    assert float(loss) == pytest.approx(expected['loss'], rel=1e-5)
    squares: dict[str, float] = {}
    for link in family_links(checkpoint.family, checkpoint.config, checkpoint.specs):
        piece = np.asarray(leaf(gradient, link.path)[link.index], np.float64)
        squares[link.name] = squares.get(link.name, 0.0) + float(np.sum(piece**2))
    norms = {name: square**0.5 for name, square in squares.items() if 'key.bias' not in name}
    assert norms == pytest.approx({k: v for k, v in expected['grad_norms'].items() if k in norms}, rel=TOLERANCE)
    assert len(norms) == len(expected['grad_norms']) - checkpoint.config.layers.num_layers


def test_names_of_older_files_and_copies_of_what_is_tied(tmp_path):
    source = Path(shutil.copytree(models.make('bert for pretraining')[1], tmp_path / 'bert'))
    old = {'LayerNorm.weight': 'LayerNorm.gamma', 'LayerNorm.bias': 'LayerNorm.beta'}

    def change(arrays):
        for name in list(arrays):
            new = next((name.replace(now, was) for now, was in old.items() if name.endswith(now)), name)
            arrays[new] = arrays.pop(name)
        arrays['cls.predictions.decoder.weight'] = arrays['bert.embeddings.word_embeddings.weight']
        arrays['bert.embeddings.position_ids'] = np.arange(40, dtype=np.float32)[None]

    change_tensors(source, change)
    change_settings(source, architectures=['BertForMaskedLM'])  # the pooler and its classifier are there all the same
    expected, found = imported('bert for pretraining')[0], open_directory(source)
    assert found.config == expected.config
    for name, shape in found.pieces.shapes.items():
        whole = (slice(None),) * len(shape)
        np.testing.assert_array_equal(found.pieces.read(name, whole), expected.pieces.read(name, whole))
    change_tensors(
        source, lambda t: t.update({'cls.predictions.decoder.weight': t['cls.predictions.decoder.weight'] + 1})
    )
    with pytest.raises(UserError, match=r'decoder\.weight is not bert\.embeddings.*, to which it is tied'):
        open_directory(source)


@pytest.mark.parametrize(
    ('name', 'changes', 'message'),
    [
        ('bert', {'is_decoder': True}, 'is_decoder is True'),
        ('bert', {'position_embedding_type': 'relative_key'}, "position_embedding_type is 'relative_key'"),
        ('bert', {'tie_word_embeddings': False}, 'tie_word_embeddings is False'),
        ('bert', {'architectures': ['BertForSequenceClassification']}, 'architectures is'),
        ('bert', {'hidden_act': 'swish'}, "hidden_act is 'swish'"),
        ('bert', {'num_attention_heads': 5}, '5 attention heads do not divide the width 32'),
        ('bert', {'spin': 1}, 'unknown settings: spin = 1'),
        ('bert', {'max_position_embeddings': 0}, 'learned positions'),
        ('roberta', {'pad_token_id': -1}, 'pad_token_id is -1'),
        ('albert', {'num_hidden_groups': 2}, 'num_hidden_groups is 2'),
        ('albert', {'inner_group_num': 2}, 'inner_group_num is 2'),
        ('t5', {'feed_forward_proj': 'gated-relu'}, "feed_forward_proj is 'gated-relu'"),
        ('t5', {'dense_act_fn': 'silu'}, "dense_act_fn is 'silu'"),
        ('t5', {'decoder_start_token_id': 5}, 'decoder_start_token_id is 5'),
        ('t5', {'num_layers': 2**40}, 'num_layers is 1099511627776'),
        ('t5', {'tie_word_embeddings': False, 'scale_decoder_outputs': True}, 'scale_decoder_outputs is True'),
        ('t5', {'scale_decoder_outputs': False}, r'lm_head\.weight is missing'),
        ('t5 v1.1', {'scale_decoder_outputs': True}, r'lm_head\.weight is not shared\.weight'),
    ],
)
def test_settings_that_are_not_supported_are_named(name, changes, message, tmp_path):
    source = Path(shutil.copytree(models.make(name)[1], tmp_path / 'model'))
    change_settings(source, **changes)
    with pytest.raises(UserError, match=message):
        open_directory(source)


FAMILIES = {name: name.split('_')[0] for name in {**ENCODERS, **ENCODER_DECODERS} if 'tiny' not in name}


def test_presets_are_models_of_their_families(tmp_path):
    for name, family in FAMILIES.items():
        module, config = ('encoder_decoder', 'EncoderDecoderConfig') if family == 't5' else ('encoder', 'EncoderConfig')
        (tmp_path / 'job.gin').write_text(JOB.format(module=module, config=config))
        preset = load_job([str(FOLDER / f'{name}.gin'), str(tmp_path / 'job.gin')])[0].model
        assert find_family(preset)[0].model_type == family
