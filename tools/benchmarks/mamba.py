"""A small Mamba on a CPU: training steps beside our own dense model and transformers' Mamba, and decoding by context.

    python tools/benchmarks/mamba.py [--rounds=3] [--kinds=mamba,mamba2]

The dense model is Llama's layer, as wide as the Mamba, with d_ff chosen so that both do the same FLOPs per token
(`llm.scaling.accounting`, the causal half of attention and the recurrence counted). A step is forward, backward and
AdamW in fp32, 8 rows of 512 tokens. transformers runs eagerly, token by token where it has no kernel, so it gets one
row once, after the others. Those take turns in one process, and each ratio is the median of the rounds' own ratios.
Times are the processor's, of all threads. Decoding is one token of one row after a context of 64 and of 8,192 tokens.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm.models.attention import AttentionConfig
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.mamba import MambaConfig
from llm.models.mamba2 import Mamba2Config
from llm.models.parameters import count_parameters, parameter_specs
from llm.scaling.accounting import RowTokens, flops_per_token
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer

ROWS, LENGTH, VOCABULARY, WIDTH, LAYERS = 8, 512, 256, 256, 8
MIXERS: dict[str, MambaConfig | Mamba2Config] = {
    'mamba': MambaConfig(d_inner=2 * WIDTH, dt_rank=WIDTH // 16),
    'mamba2': Mamba2Config(num_heads=2 * WIDTH // 64, head_dim=64, state_size=64),
}


def model(layer: LayerConfig, layers: int, position: str) -> DecoderConfig:
    """A decoder of such layers."""
    return DecoderConfig(VOCABULARY, WIDTH, layers, (layer,), position=position, tied_embeddings=True)  # type: ignore[arg-type]


def flops(config: DecoderConfig) -> float:
    """Per token, forward."""
    return flops_per_token(config, parameter_specs(Decoder(config)), RowTokens(LENGTH)).forward(causal=True)


def dense_like(target: float) -> DecoderConfig:
    """The dense model of half as many layers (each with a feed-forward layer) that comes nearest to these FLOPs."""
    attention = AttentionConfig(WIDTH // 64, WIDTH // 64, 64)

    def config(d_ff: int) -> DecoderConfig:
        return model(LayerConfig(attention, FeedForwardConfig(d_ff)), LAYERS // 2, 'rope')

    return min((config(d_ff) for d_ff in range(64, 4096, 16)), key=lambda each: abs(flops(each) - target))


def training(config: DecoderConfig) -> Callable[[], None]:
    """A training step."""
    trainer = Trainer(config, OptimizerConfig(), StepConfig(ROWS, LENGTH), 1000, devices=jax.devices()[:1])
    state = trainer.fresh_state()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
    batch = {
        'inputs': tokens[:, :-1],
        'targets': tokens[:, 1:],
        'loss_weights': np.ones((ROWS, LENGTH), np.float32),
        'segment_ids': np.ones((ROWS, LENGTH), np.int32),
        'positions': np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
    }

    def step() -> None:
        nonlocal state
        state, metrics = trainer.train_step(state, batch)
        jax.block_until_ready(metrics)

    return step


def torch_training(kind: str) -> Callable[[], None]:
    """The same of transformers."""
    import torch
    import transformers

    network: Any
    sizes: dict[str, Any] = {'vocab_size': VOCABULARY, 'hidden_size': WIDTH, 'num_hidden_layers': LAYERS}
    if kind == 'mamba':
        network = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    else:
        mixer = MIXERS[kind]
        assert isinstance(mixer, Mamba2Config)
        heads: dict[str, Any] = {
            'num_heads': mixer.num_heads,
            'head_dim': mixer.head_dim,
            'state_size': mixer.state_size,
        }
        settings = transformers.Mamba2Config(**sizes, **heads, n_groups=1, chunk_size=64, tie_word_embeddings=True)
        network = transformers.Mamba2ForCausalLM(settings)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    tokens = torch.tensor(np.random.default_rng(0).integers(0, VOCABULARY, (1, LENGTH)))

    def step() -> None:
        optimizer.zero_grad()
        network(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()

    return step


def decoding(config: DecoderConfig, context: int) -> Callable[[], None]:
    """One token after `context` tokens. What the state holds does not matter for the time, so none of them are run."""
    decoder = Decoder(config)
    graph, _ = nnx.split(decoder)
    parameters = jax.tree.map(lambda spec: jnp.full(spec.shape, 0.01), parameter_specs(decoder))
    cache = decoder.init_cache(1, context + 64)
    decode = jax.jit(
        lambda p, cache, at: nnx.merge(graph, p).decode(jnp.zeros((1, 1), jnp.int32), cache, at), donate_argnums=1
    )
    at = jnp.full((1,), context, jnp.int32)

    def step() -> None:
        nonlocal cache
        for _ in range(50):
            logits, cache = decode(parameters, cache, at)
        jax.block_until_ready(logits)

    return step


def rounds(steps: dict[str, Callable[[], None]], count: int) -> dict[str, list[float]]:
    """Seconds of each, round by round; each is run once before."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(count):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def main() -> None:
    """Print both sides of every ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--kinds', default=','.join(MIXERS))
    parser.add_argument('--no_torch', action='store_true')
    arguments = parser.parse_args()
    for kind in arguments.kinds.split(','):
        config = model(LayerConfig(MIXERS[kind], None), LAYERS, 'none')
        dense = dense_like(flops(config))
        for name, each in ((kind, config), (f'dense, {dense.pattern[0].feed_forward}', dense)):
            size = count_parameters(parameter_specs(Decoder(each)))
            print(f'{name}: {size:,} parameters, {flops(each):,.0f} FLOPs a token')
        steps = {kind: training(config), 'dense': training(dense)}
        times = rounds(steps, arguments.rounds)
        for name, seconds in times.items():
            print(f'  training, {name}: {ROWS * LENGTH / statistics.median(seconds):,.0f} tokens/s')
        print(f'  {kind} over dense: {ratio(times, "dense", kind):.2f}')
        if not arguments.no_torch:
            speed = LENGTH / rounds({'transformers': torch_training(kind)}, 1)['transformers'][0]
            print(f'  training, transformers: {speed:,.0f} tokens/s')
            print(f'  {kind} over transformers: {ROWS * LENGTH / statistics.median(times[kind]) / speed:.2f}')
        times = rounds(
            {f'{kind} {n}': decoding(config, n) for n in (64, 8192)}
            | {f'dense {n}': decoding(dense, n) for n in (64, 8192)},
            arguments.rounds,
        )
        for name, seconds in times.items():
            print(f'  decoding, {name} tokens of context: {20 * statistics.median(seconds):.2f} ms a token')


if __name__ == '__main__':
    main()
