"""One training step of the same model here and in PyTorch, interleaved, beside this machine's fp32 matmul peak.

    python tools/benchmarks/train_step.py [--rounds=7] [--contenders=ours,torch.compile fp32]
    python tools/benchmarks/train_step.py --gpu

The model is GPT-2's block at a size that a laptop trains: 6 layers, 384 wide, 6 heads, vocabulary 256, learned
positions, tied embeddings, 16 rows of 256 tokens, no dropout; one step is forward, backward, clipping to norm 1 and
AdamW. Both are given the same parameters and the same batch first, and must agree on the loss before anything is
timed. Each contender is a process of its own with two threads that waits, without computing, while others run. The
peak is PyTorch's 2048 x 2048 fp32 product. In each round the fastest of a contender's steps (products) counts; every
figure is the median over the rounds, and a ratio is the median of the rounds' own ratios, so that a noisy neighbour
disturbs both sides of it.

FLOPs are counted as in `llm.scaling.accounting`, with the causal half of attention only.

With `--gpu` everything happens on one NVIDIA GPU of 80 GB, in bf16 with parameters and optimizer in fp32: 16 layers,
2048 wide, 16 heads of 128, vocabulary 50,304, 0.9 B parameters, 4 rows of 2048 tokens, no recomputation. PyTorch
attends with `scaled_dot_product_attention`, which takes FlashAttention or cuDNN. Each contender also gets its MFU:
FLOPs of the model over the bf16 peak that the GPU's maker states. The measured peak is of an 8192 x 8192 bf16 product.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

RATE, BETAS, EPSILON, DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1


@dataclasses.dataclass(frozen=True)
class Setting:
    """The model, its batch and where it runs; `peak_size`: side of the product that the peak is measured with."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    rows: int
    length: int
    device: str
    peak_size: int
    contenders: tuple[str, ...]


CPU = Setting(
    6,
    384,
    6,
    256,
    16,
    256,
    'cpu',
    2048,
    ('ours', 'torch eager fp32', 'torch.compile fp32', 'torch.compile bf16', 'matmul peak'),
)
GPU = Setting(16, 2048, 16, 50_304, 4, 2048, 'cuda', 8192, ('ours', 'torch.compile bf16', 'matmul peak'))


def parameters(setting: Setting) -> dict[str, np.ndarray]:
    """Initial values by the names of our table, layers stacked along the first axis."""
    rng = np.random.default_rng(0)
    layers, width, heads = setting.layers, setting.width, setting.heads
    size = width // heads
    shapes = {
        'layers/0/mixer/query': (layers, width, heads, size),
        'layers/0/mixer/key': (layers, width, heads, size),
        'layers/0/mixer/value': (layers, width, heads, size),
        'layers/0/mixer/output': (layers, heads, size, width),
        'layers/0/feed_forward/up': (layers, width, 4 * width),
        'layers/0/feed_forward/down': (layers, 4 * width, width),
        'embedding/table': (setting.vocabulary, width),
        'positions/table': (setting.length, width),
    }
    return {name: (0.02 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def batches(setting: Setting) -> list[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets), [B, S] each."""
    ids = np.random.default_rng(1).integers(0, setting.vocabulary, (4, setting.rows, setting.length + 1))
    return [(rows[:, :-1], rows[:, 1:]) for rows in ids]


def ours(setting: Setting) -> tuple[Callable[[], float], float, float]:
    """A function that runs one step and gives the loss, the FLOPs of a step, and the device's stated bf16 peak or 0."""
    import jax

    from llm.models.attention import AttentionConfig
    from llm.models.decoder import DecoderConfig
    from llm.models.feed_forward import FeedForwardConfig
    from llm.models.layer import LayerConfig
    from llm.models.normalization import NormConfig
    from llm.scaling.accounting import RowTokens, flops_per_token
    from llm.scaling.chips import device_peak_flops
    from llm.training.optimizers import OptimizerConfig
    from llm.training.schedules import ScheduleConfig
    from llm.training.step import StepConfig
    from llm.training.trainer import Trainer

    device = jax.devices()[0]
    if setting.device == 'cuda' and device.platform != 'gpu':
        sys.exit(f'train_step.py --gpu needs an NVIDIA GPU, and jax finds {device.device_kind} here.')
    width, heads = setting.width, setting.heads
    norm = NormConfig('layer', bias=True)
    layer = LayerConfig(
        mixer=AttentionConfig(heads, heads, width // heads, qkv_bias=True, output_bias=True),
        feed_forward=FeedForwardConfig(4 * width, 'gelu_tanh', bias=True),
        norm=norm,
    )
    model = DecoderConfig(
        vocab_size=setting.vocabulary,
        d_model=width,
        num_layers=setting.layers,
        pattern=(layer,),
        final_norm=norm,
        position='learned',
        max_positions=setting.length,
        tied_embeddings=True,
        compute_dtype='float32' if setting.device == 'cpu' else 'bfloat16',
    )
    schedule = ScheduleConfig(kind='constant', warmup_steps=0)
    optimizer = OptimizerConfig('adamw', RATE, beta1=BETAS[0], beta2=BETAS[1], weight_decay=DECAY, schedule=schedule)
    trainer = Trainer(model, optimizer, StepConfig(setting.rows, setting.length), total_steps=1000)
    state = trainer.fresh_state()
    for name, value in parameters(setting).items():
        *path, last = name.split('/')
        node = state['parameters']
        for key in path:
            node = node[key]
        node[last] = jax.device_put(value, node[last].sharding)
    examples = []
    for inputs, targets in batches(setting):
        batch = {
            'inputs': inputs.astype(np.int32),
            'targets': targets.astype(np.int32),
            'loss_weights': np.ones(inputs.shape, np.float32),
            'segment_ids': np.ones(inputs.shape, np.int32),
            'positions': np.broadcast_to(np.arange(setting.length, dtype=np.int32), inputs.shape),
        }
        examples.append(jax.device_put(batch, trainer.batch_sharding))
    done = 0

    def step() -> float:
        nonlocal state, done
        state, metrics = trainer.train_step(state, examples[done % len(examples)])
        done += 1
        return float(metrics['loss'])

    per_token = flops_per_token(model, trainer.specs, RowTokens(setting.length)).training(causal=True)
    flops = per_token * setting.rows * setting.length
    return step, flops, device_peak_flops(device.device_kind, 1)


def in_torch(setting: Setting, compiled: bool, bfloat16: bool) -> Callable[[], float]:
    """The same in PyTorch, as its users would write it for speed: fused attention, fused AdamW."""
    import torch
    from torch import nn
    from torch.nn import functional

    if setting.device == 'cpu':
        torch.set_num_threads(2)
    torch.set_default_device(setting.device)
    layers, width, heads = setting.layers, setting.width, setting.heads
    start = {name: torch.from_numpy(value) for name, value in parameters(setting).items()}

    class Block(nn.Module):
        def __init__(self, index: int):
            super().__init__()
            self.mixer_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            mixer, feed_forward = 'layers/0/mixer/', 'layers/0/feed_forward/'
            qkv = [start[mixer + name][index].reshape(width, width) for name in ('query', 'key', 'value')]
            kernels = {
                self.qkv: torch.cat(qkv, 1),
                self.output: start[mixer + 'output'][index].reshape(width, width),
                self.up: start[feed_forward + 'up'][index],
                self.down: start[feed_forward + 'down'][index],
            }
            for linear, kernel in kernels.items():
                linear.weight = nn.Parameter(kernel.T.contiguous().to(setting.device))
                nn.init.zeros_(linear.bias)

        def forward(self, x: Any) -> Any:
            qkv = self.qkv(self.mixer_norm(x)).view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
            x = x + self.output(mixed.transpose(1, 2).reshape(x.shape))
            hidden = functional.gelu(self.up(self.feed_forward_norm(x)), approximate='tanh')
            return x + self.down(hidden)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(start['embedding/table'].to(setting.device))
            self.positions = nn.Parameter(start['positions/table'].to(setting.device))
            self.blocks = nn.ModuleList(Block(i) for i in range(layers))
            self.norm = nn.LayerNorm(width)

        def forward(self, inputs: Any, targets: Any) -> Any:
            x = functional.embedding(inputs, self.tokens) + self.positions
            for block in self.blocks:
                x = block(x)
            logits = functional.linear(self.norm(x), self.tokens)
            return functional.cross_entropy(logits.float().view(-1, setting.vocabulary), targets.reshape(-1))

    model = Model()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{'params': decayed, 'weight_decay': DECAY}, {'params': rest, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, RATE, BETAS, EPSILON, fused=True)
    forward = torch.compile(model) if compiled else model
    examples = [tuple(torch.from_numpy(x).to(setting.device) for x in pair) for pair in batches(setting)]
    done = 0

    def step() -> float:
        nonlocal done
        with torch.autocast(setting.device, torch.bfloat16, enabled=bfloat16):
            loss = forward(*examples[done % len(examples)])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        return loss.item()

    return step


def matmul_peak(setting: Setting) -> Callable[[], float]:
    """One product in PyTorch."""
    import torch

    if setting.device == 'cpu':
        torch.set_num_threads(2)
    torch.set_default_device(setting.device)
    torch.set_default_dtype(torch.float32 if setting.device == 'cpu' else torch.bfloat16)
    size = setting.peak_size
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    return lambda: float(torch.mm(a, b, out=out)[0, 0])


def work(name: str, setting: Setting) -> None:
    """Answer each line on standard input with the seconds of each of so many steps."""
    flops, stated = 2.0 * setting.peak_size**3, 0.0
    if name == 'ours':
        step, flops, stated = ours(setting)
    elif name == 'matmul peak':
        step = matmul_peak(setting)
    else:
        step = in_torch(setting, 'compile' in name, 'bf16' in name)
    first = [step() for _ in range(3)]
    print(json.dumps({'losses': first, 'flops': flops, 'stated': stated}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=7, help='times that each contender runs')
    parser.add_argument('--steps', type=int, default=3, help='steps a round; the fastest of them counts')
    parser.add_argument('--contenders', default='', help='separated by commas; default: all')
    parser.add_argument('--gpu', action='store_true', help='a larger model in bf16 on a GPU')
    parser.add_argument('--work', choices=CPU.contenders, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    setting = GPU if arguments.gpu else CPU
    if arguments.work:
        work(arguments.work, setting)
        return
    cores = sorted(os.sched_getaffinity(0))[:2]
    environment, pinned = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}, []
    if not arguments.gpu:
        environment |= {'JAX_PLATFORMS': 'cpu', 'OMP_NUM_THREADS': '2'}
        pinned = ['taskset', '-c', ','.join(map(str, cores))]
    workers: dict[str, subprocess.Popen[str]] = {}
    ready: dict[str, Any] = {}
    for name in arguments.contenders.split(',') if arguments.contenders else setting.contenders:
        command = [*pinned, sys.executable, __file__, '--work', name, *(['--gpu'] if arguments.gpu else [])]
        workers[name] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        answer = workers[name].stdout.readline()  # type: ignore[union-attr]
        if not answer:
            sys.exit(workers[name].wait() or 1)  # it has said why
        ready[name] = json.loads(answer)
        if name != 'matmul peak':
            print(f'{name}: losses of the first steps {[round(loss, 5) for loss in ready[name]["losses"]]}')
    trained = [name for name in workers if name != 'matmul peak']
    for name in trained[1:]:
        tolerance = 2e-2 if 'bf16' in name or arguments.gpu else 1e-3
        difference = np.abs(np.subtract(ready[name]['losses'], ready[trained[0]]['losses'])).max()
        assert difference < tolerance, f'{name} and {trained[0]} are not the same model'

    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(arguments.rounds):
        for name, worker in workers.items():
            worker.stdin.write(f'{10 if name == "matmul peak" else arguments.steps}\n')  # type: ignore[union-attr]
            worker.stdin.flush()  # type: ignore[union-attr]
            seconds[name].append(min(json.loads(worker.stdout.readline())))  # type: ignore[union-attr]
    for worker in workers.values():
        worker.communicate()

    for name in workers:
        flops = ready[name]['flops'] if name == 'matmul peak' else ready['ours']['flops']
        median = statistics.median(seconds[name])
        spread = f'{min(seconds[name]):.3f} to {max(seconds[name]):.3f}'
        tokens = '' if name == 'matmul peak' else f'{setting.rows * setting.length / median:8,.0f} tokens/s'
        stated = ready['ours']['stated'] if arguments.gpu else 0.0
        utilization = f'  MFU {100 * flops / median / stated:.1f}%' if stated else ''
        print(f'{name:20} {median:7.3f} s ({spread})  {flops / median / 1e9:6.1f} GFLOP/s  {tokens}{utilization}')
    for name in trained:
        if name != 'ours':
            ratios = [theirs / mine for theirs, mine in zip(seconds[name], seconds['ours'], strict=True)]
            print(f'ours / {name}: {statistics.median(ratios):.2f}x')
    if 'matmul peak' in workers:
        per_flop = ready['ours']['flops'] / ready['matmul peak']['flops']
        shares = [per_flop * p / o for p, o in zip(seconds['matmul peak'], seconds['ours'], strict=True)]
        print(f'ours / matmul peak: {100 * statistics.median(shares):.0f}%')


if __name__ == '__main__':
    main()
