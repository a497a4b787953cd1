"""Our GPU flash attention beside cuDNN's and the plain reference, in one run on the same arrays. Needs an NVIDIA GPU.

    python tools/benchmarks/attention_gpu.py [--shapes=4x4096x32x8x128] [--rounds=11] [--full] [--dtype=float16]

A shape is B x S x H x G x K: rows, tokens, query heads, key/value heads, head size. For each shape, forward and forward
plus backward, the contenders take turns: in every round each runs `--calls` times. Printed are the median over the
rounds of the time of a call, its TFLOP/s, the median of the rounds' own ratios to ours (above 1: slower than ours), and
the largest difference of the output and of any gradient from the reference's, over the reference's largest value.

FLOPs are those of the products, the causal half of them unless `--full`: two forward and five backward (Dao 2023), for
every contender, whatever it computes twice. The reference holds all scores: leave it out with `--contenders` where they
do not fit, and nothing is compared.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

CONTENDERS: dict[str, Literal['pallas_gpu', 'cudnn', 'reference']] = {
    'ours': 'pallas_gpu',
    'cudnn': 'cudnn',
    'reference': 'reference',
}
SHAPES = '8x2048x16x16x64,8x2048x32x8x128,2x8192x32x8x128,4x4096x8x4x256'


def functions(contender: str, causal: bool, scale: float) -> dict[str, Callable[..., Any]]:
    """Compiled functions of query, key, value and the gradient of the output, by what they compute."""
    import jax

    from llm.kernels.attention import dot_product_attention

    attend = functools.partial(dot_product_attention, scale=scale, causal=causal, implementation=CONTENDERS[contender])

    def forward(query: jax.Array, key: jax.Array, value: jax.Array, d_output: jax.Array) -> Any:
        return (attend(query, key, value),)

    def both(query: jax.Array, key: jax.Array, value: jax.Array, d_output: jax.Array) -> Any:
        output, pullback = jax.vjp(attend, query, key, value)
        return output, *pullback(d_output)

    return {'forward': jax.jit(forward), 'forward + backward': jax.jit(both)}


def largest_difference(results: Any, expected: Any) -> float:
    """Of any array in `results`, over the largest value of the one in `expected`."""
    import jax.numpy as jnp

    pairs = [(x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in zip(results, expected, strict=True)]
    return max(float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))) for x, y in pairs)


def measure(shape: tuple[int, ...], arguments: argparse.Namespace, contenders: list[str]) -> None:
    """Run every contender on one shape, and print a line for each."""
    import jax

    batch, length, heads, kv_heads, size = shape
    keys = jax.random.split(jax.random.key(0), 4)
    given = [
        jax.random.normal(key, (batch, length, n, size), arguments.dtype)
        for key, n in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    ]
    compiled = {name: functions(name, not arguments.full, size**-0.5) for name in contenders}
    product = 2 * batch * heads * length**2 * size * (1 if arguments.full else 0.5)
    for what, products in (('forward', 2), ('forward + backward', 7)):
        run = {name: compiled[name][what] for name in contenders}
        results = {name: jax.block_until_ready(function(*given)) for name, function in run.items()}
        differences = {}
        if 'reference' in results:
            differences = {name: largest_difference(each, results['reference']) for name, each in results.items()}
        del results
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for name, function in run.items():
                start = time.perf_counter()
                for _ in range(arguments.calls):
                    result = function(*given)
                jax.block_until_ready(result)
                seconds[name].append((time.perf_counter() - start) / arguments.calls)
                del result
        print(f'{"x".join(map(str, shape))}, {what}')
        for name in contenders:
            median = statistics.median(seconds[name])
            ratio = statistics.median(x / y for x, y in zip(seconds[name], seconds[contenders[0]], strict=True))
            difference = f'difference {differences[name]:.1e}' if name in differences else ''
            rate = products * product / median / 1e12
            print(f'    {name:10} {1e3 * median:9.3f} ms  {rate:7.1f} TFLOP/s  {ratio:6.2f}x  {difference}'.rstrip())


def main() -> None:
    """Measure every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', default=SHAPES, help='separated by commas')
    parser.add_argument('--dtype', choices=('bfloat16', 'float16'), default='bfloat16')
    parser.add_argument('--full', action='store_true', help='without the causal mask')
    parser.add_argument('--rounds', type=int, default=11, help='times that the contenders take turns')
    parser.add_argument('--calls', type=int, default=10, help='calls of a contender in its turn')
    parser.add_argument('--contenders', default=','.join(CONTENDERS), help='separated by commas; the first is ours')
    arguments = parser.parse_args()
    contenders = arguments.contenders.split(',')
    try:
        shapes = [tuple(map(int, shape.split('x'))) for shape in arguments.shapes.split(',')]
    except ValueError:
        shapes = [()]
    if contenders[0] != 'ours' or not set(contenders) <= set(CONTENDERS):
        parser.error(f'--contenders must start with ours and name no others than {", ".join(CONTENDERS)}')
    if any(len(shape) != 5 or min(shape) < 1 or shape[2] % shape[3] for shape in shapes):
        parser.error('--shapes must be BxSxHxGxK, where G divides H')
    import jax

    device = jax.devices()[0]
    if device.platform != 'gpu':
        sys.exit(f'attention_gpu.py needs an NVIDIA GPU, and jax finds {device.device_kind} here.')
    print(f'{device.device_kind}, jax {jax.__version__}, {arguments.dtype}, {"full" if arguments.full else "causal"}')
    for shape in shapes:
        measure(shape, arguments, contenders)


if __name__ == '__main__':
    main()
