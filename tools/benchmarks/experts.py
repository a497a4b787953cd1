"""A training step of a small mixture of experts beside our dense model of the same FLOPs a token, on this CPU.

    python tools/benchmarks/experts.py [--rounds=7] [--steps=4] [--no_torch]

Both have 6 layers, 384 wide, 6 heads, vocabulary 256 and 16 rows of 256 tokens; the dense one's feed-forward layers are
SwiGLU, 1024 wide, the other's are 8 experts, 512 wide, of which a token sees 2. One step is forward, backward, clipping
and AdamW. They take turns, and with them transformers' Mixtral of the same sizes, eager, in fp32. A step's time is the
processor's, of all threads; in each round the least of each counts, and the figure is the median of the rounds' ratios,
so that a noisy neighbour disturbs all sides. The router adds 0.3% to the FLOPs.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import numpy as np

from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig, TokenwiseConfig
from llm.models.moe import MoeConfig
from llm.parallel.mesh import MeshConfig
from llm.scaling.accounting import RowTokens, count, flops_per_token
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer

ROWS, LENGTH, VOCABULARY, D_FF = 16, 256, 256, 1024


class Contender:
    """A model in training."""

    def __init__(self, network: TokenwiseConfig) -> None:
        layer = LayerConfig(AttentionConfig(num_heads=6, num_kv_heads=6, head_dim=64), network)
        model = DecoderConfig(VOCABULARY, 384, 6, (layer,), tied_embeddings=True)
        self.trainer = Trainer(
            model, OptimizerConfig(), StepConfig(ROWS, LENGTH), 1000, MeshConfig(data=1), devices=jax.devices()[:1]
        )
        self.parameters = count(model, self.trainer.specs)
        self.flops = flops_per_token(model, self.trainer.specs, RowTokens(LENGTH)).training(causal=True)
        self.state: Any = self.trainer.fresh_state()
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH + 1), dtype=np.int32)
        ones = np.ones((ROWS, LENGTH), np.int32)
        batch = {'inputs': tokens[:, :-1], 'targets': tokens[:, 1:], 'loss_weights': ones.astype(np.float32)}
        positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
        self.batch = jax.device_put(batch | {'segment_ids': ones, 'positions': positions})
        self.metrics: dict[str, float] = {}
        self.step()

    def step(self) -> float:
        """Seconds of one."""
        start = time.process_time()
        self.state, metrics = self.trainer.train_step(self.state, self.batch)
        self.metrics = {name: float(value) for name, value in metrics.items()}
        return time.process_time() - start

    def __str__(self) -> str:
        counted = f'{self.parameters.total:,} parameters, {self.parameters.active:,} active'
        return f'{counted}, {self.flops / 1e6:.1f} MFLOPs a token'


class Mixtral:
    """The same mixture by transformers."""

    def __init__(self) -> None:
        import torch
        import transformers

        config = transformers.MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=384,
            intermediate_size=D_FF // 2,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=6,
            num_local_experts=8,
            num_experts_per_tok=2,
            output_router_logits=True,
            tie_word_embeddings=True,
        )
        self.clip = torch.nn.utils.clip_grad_norm_
        self.model: Any = transformers.MixtralForCausalLM(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        self.tokens = torch.tensor(np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH)))
        self.step()

    def step(self) -> float:
        """Seconds of one."""
        start = time.process_time()
        self.optimizer.zero_grad()
        self.model(self.tokens, labels=self.tokens, use_cache=False).loss.backward()
        self.clip(self.model.parameters(), 1.0)
        self.optimizer.step()
        return time.process_time() - start

    def __str__(self) -> str:
        return f'{sum(p.numel() for p in self.model.parameters()):,} parameters'


def main() -> None:
    """Time both and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--steps', type=int, default=4)
    parser.add_argument('--no_torch', action='store_true')
    arguments = parser.parse_args()
    experts = MoeConfig(num_experts=8, experts_per_token=2, expert=FeedForwardConfig(D_FF // 2))
    dropless = Contender(experts)
    contenders: dict[str, Contender | Mixtral] = {
        'dense': Contender(FeedForwardConfig(D_FF)),
        'experts, dropless': dropless,
    }
    if not arguments.no_torch:
        contenders['transformers'] = Mixtral()
    rounds = [
        {name: min(each.step() for _ in range(arguments.steps)) for name, each in contenders.items()}
        for _ in range(arguments.rounds)
    ]
    for name, each in contenders.items():
        seconds = statistics.median(one[name] for one in rounds)
        share = statistics.median(one['dense'] / one[name] for one in rounds)
        print(
            f'{name:18} {each}: {seconds:.3f} s a step, {ROWS * LENGTH / seconds:,.0f} tokens/s, '
            f'{100 * share:.0f}% of dense'
        )
    print(f'busiest expert over the mean: {dropless.metrics["expert_load"]:.2f}')


if __name__ == '__main__':
    main()
