"""Our TPU flash attention beside JAX's own splash and flash attention, as the TPU compiler sees them.

    python tools/benchmarks/attention_kernels.py [--topology=v5e:2x2] [--length=4096] [--heads=8] [--kv_heads=8]

Forward and backward of one layer in bf16, compiled for one chip of the topology, on any machine. For each kernel it
prints, with the causal mask and without: the temporaries in memory; bytes to and from HBM, of its kernels by their
grids and blocks (kernel_traffic.py) and of the whole program by its instructions, which count a kernel's operands once;
and the VLIW bundles of each kernel. With the mask a kernel has two versions of a step, with and without masking; else
one, whose bundles are about the cycles of a step; divided by the scores of a step, so that blocks of different sizes
compare, they are what a score costs.

Splash attention and flash attention run with blocks of 512, as MaxText starts splash, and of 1024, ours with those that
it chooses.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTENDERS = (
    'ours',
    'splash 512',
    'splash 512, fused backward',
    'splash 1024',
    'splash 1024, fused backward',
    'flash 512',
    'flash 1024',
)


def contenders(
    batch: int, length: int, heads: int, kv_heads: int, size: int, device: Any, causal: bool
) -> dict[str, Callable[..., Any]]:
    """Functions of query [B, S, H, K], key and value [B, S, G, K] that mean the same."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu import flash_attention as flash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    from llm.kernels.attention import dot_product_attention

    scale = size**-0.5

    def heads_first(x: jax.Array) -> jax.Array:
        return x.transpose(0, 2, 1, 3)

    def with_splash(block: int, fused: bool, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        mask = masks.CausalMask((length, length)) if causal else masks.FullMask((length, length))
        own_pass = None if fused else block
        blocks = splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=own_pass,
            block_kv_dq=own_pass,
            use_fused_bwd_kernel=fused,
        )
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1
        )
        return heads_first(jax.vmap(kernel)(*(heads_first(x) for x in (query * scale, key, value))))

    def with_flash(block: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        key, value = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (key, value))
        names = [field for field in flash.BlockSizes.__dataclass_fields__ if field != 'block_b']
        blocks = flash.BlockSizes(block_b=1, **dict.fromkeys(names, block))
        arrays = (heads_first(x) for x in (query, key, value))
        return heads_first(flash.flash_attention(*arrays, causal=causal, sm_scale=scale, block_sizes=blocks))

    ours = functools.partial(dot_product_attention, scale=scale, causal=causal, device=device)
    found: dict[str, Callable[..., Any]] = {'ours': ours}
    for block in (512, 1024):
        found[f'splash {block}'] = functools.partial(with_splash, block, False)
        found[f'splash {block}, fused backward'] = functools.partial(with_splash, block, True)
        found[f'flash {block}'] = functools.partial(with_flash, block)
    return found


def compile_one(arguments: argparse.Namespace) -> None:
    """Compile one contender and print its figures as JSON; the compiler leaves its dumps where it was told to."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from kernel_traffic import kernel_traffic  # beside this file

    from llm.scaling.program import hbm_bytes

    device = topologies.get_topology_desc(platform='tpu', topology_name=arguments.topology).devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ('one',)), PartitionSpec())
    shape = arguments.batch, arguments.length, arguments.heads, arguments.head_size
    kv_shape = arguments.batch, arguments.length, arguments.kv_heads, arguments.head_size
    q, kv = (jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=sharding) for x in (shape, kv_shape))
    function = contenders(
        arguments.batch,
        arguments.length,
        arguments.heads,
        arguments.kv_heads,
        arguments.head_size,
        device,
        arguments.causal,
    )[arguments.contender]

    def both(query: jax.Array, key: jax.Array, value: jax.Array, d_output: jax.Array) -> Any:
        output, pullback = jax.vjp(function, query, key, value)
        return output, pullback(d_output)

    compiled = jax.jit(both).lower(q, kv, kv, q).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    traffic = kernel_traffic(both, q, kv, kv, q)
    figures = {
        'temporaries': memory.temp_size_in_bytes,
        'program': hbm_bytes(text),
        'kernels': {f'kernel {i + 1}, {each.name}': each.total for i, each in enumerate(traffic)},
    }
    print(json.dumps(figures))


def bundles(folder: Path) -> dict[str, int]:
    """Bundles of each kernel of a program, by name, from the compiler's dump."""
    found = {}
    for path in folder.glob('*schedule-analysis_final_bundles.txt'):
        text = path.read_text(errors='replace')
        if 'tpu_custom_call' in text:
            name = re.sub(r'^\d+-|-\d+-schedule.*$', '', path.name)
            match = re.search(r'total scheduled bundles:\s*(\d+)', text)
            assert match is not None, f'{path} does not say how many bundles it counts'
            found[name] = int(match[1])
    return found


def run_and_count(script: list[str]) -> tuple[subprocess.CompletedProcess[str], dict[str, int]]:
    """Run a Python script with arguments that compiles for a TPU; what it did, and the bundles of each kernel."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            'JAX_PLATFORMS': 'cpu',
            'TPU_SKIP_MDS_QUERY': '1',
            'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
            'TPU_WORKER_HOSTNAMES': 'localhost',
            'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
            'LIBTPU_INIT_ARGS': f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true',
        }
        command = [sys.executable, *script]
        done = subprocess.run(command, check=False, env=os.environ | settings, capture_output=True, text=True)
        return done, {} if done.returncode else bundles(Path(folder))


def measure(arguments: argparse.Namespace, contender: str, causal: bool) -> dict[str, Any]:
    """The figures of a contender, compiled in a process of its own; what the compiler said if it failed."""
    flags = {name: value for name, value in vars(arguments).items() if name not in ('contender', 'causal')}
    options = [*(f'--{name}={value}' for name, value in flags.items()), f'--contender={contender}']
    done, counts = run_and_count([__file__, *options, *(['--causal'] if causal else [])])
    if done.returncode:
        return {'failure': done.stderr.strip().splitlines()[-1][:300]}
    return {**json.loads(done.stdout.splitlines()[-1]), 'bundles': counts}


def main() -> None:
    """Compile every contender, with and without the causal mask, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--topology', default='v5e:2x2')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--length', type=int, default=4096)
    parser.add_argument('--heads', type=int, default=8)
    parser.add_argument('--kv_heads', type=int, default=8)
    parser.add_argument('--head_size', type=int, default=128)
    parser.add_argument('--contenders', default=';'.join(CONTENDERS))
    parser.add_argument('--contender', help=argparse.SUPPRESS)
    parser.add_argument('--causal', action='store_true', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        compile_one(arguments)
        return
    print(f'{vars(arguments)}')
    for contender in arguments.contenders.split(';'):
        for causal in (True, False):
            print(f'{contender}, {"causal" if causal else "no"} mask: ', end='', flush=True)
            figures = measure(arguments, contender, causal)
            if 'failure' in figures:
                print(figures['failure'])
                continue
            moved = sum(figures['kernels'].values())
            print(
                f'temporaries {figures["temporaries"] / 1e6:.1f} MB; HBM: kernels {moved / 1e6:.1f} MB, '
                f'program with each operand of a kernel once {figures["program"] / 1e6:.1f} MB'
            )
            for name, size in figures['kernels'].items():
                print(f'    {name}: {size / 1e6:.1f} MB')
            for name, count in sorted(figures['bundles'].items()):
                print(f'    {name}: {count} bundles')


if __name__ == '__main__':
    main()
