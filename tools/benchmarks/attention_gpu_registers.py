"""What NVIDIA's compiler makes of our GPU attention kernels: registers and spills, on any machine, without a GPU.

    pip install --no-deps jax-cuda12-plugin==JAX jax-cuda12-pjrt==JAX nvidia-cuda-nvcc-cu12    # JAX: your jax's version
    python tools/benchmarks/attention_gpu_registers.py [--gpu=8.0] [--sizes=64,128,256] [--plain] [--length=4096]

XLA compiles forward and backward of one layer in bf16 for the GPU of that compute capability: it refuses programs that
ask for more shared memory than there is. Then ptxas assembles the same PTX again and says what each kernel takes of the
65,536 registers of a multiprocessor, and how many bytes a thread keeps in memory because there were not enough. Rows
are causal and packed, with every other option too unless `--plain`. Better in an environment of its own: jax tries to
start a plugin that is installed.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Compute capability -> shared memory of one program in bytes, and of a multiprocessor.
GPUS = {
    '8.0': (166_912, 167_936),
    '8.6': (101_376, 102_400),
    '8.9': (101_376, 102_400),
    '9.0': (232_448, 233_472),
    '10.0': (232_448, 233_472),
    '12.0': (101_376, 102_400),
}


def target(gpu: str) -> str:
    """XLA's description of a GPU; what it says of speed and size is a H100's, and changes no Triton kernel."""
    (shared, shared_of_all), (major, minor) = GPUS[gpu], gpu.split('.')
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_of_all} shared_memory_per_block_optin: {shared}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 device_memory_size: 84929347584
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 8 }}
dnn_version_info {{ major: 9 minor: 7 }}
device_description_str: "compute capability {gpu}"
"""


def compile_layer(device: Any, size: int, length: int, plain: bool) -> int:
    """Compile forward and backward with heads of `size`; the bytes of temporaries."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from llm.kernels.attention import dot_product_attention

    sharding = NamedSharding(Mesh(np.array([device]), ('one',)), PartitionSpec())
    batch, heads, kv_heads = 2, 8, 2

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    ids = array(batch, length, dtype=jnp.int32)
    traced = {'query_segment_ids': ids, 'key_segment_ids': ids}
    static: dict[str, Any] = {'scale': size**-0.5, 'device': device}
    if not plain:
        traced |= dict.fromkeys(('query_offset', 'key_lengths'), array(batch, dtype=jnp.int32))
        traced |= dict.fromkeys(('alibi_slopes', 'sinks'), array(heads, dtype=jnp.float32))
        static |= {'window': length // 8, 'soft_cap': 50.0}

    def both(query: jax.Array, key: jax.Array, value: jax.Array, d_output: jax.Array, traced: Any) -> Any:
        output, pullback = jax.vjp(
            lambda q, k, v: dot_product_attention(q, k, v, **static, **traced), query, key, value
        )
        return output, pullback(d_output)

    query, key = array(batch, length, heads, size), array(batch, length, kv_heads, size)
    memory = jax.jit(both).lower(query, key, key, query, traced).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def kernels(folder: Path, ptxas: Path) -> dict[str, tuple[int, int]]:
    """(Registers, bytes spilled) of a thread, by kernel, from the PTX that XLA left in a folder."""
    found = {}
    for path in folder.glob('*.ptx'):
        match = re.search(r'\.target (\w+)', path.read_text())
        if match is None:
            continue
        command = [ptxas, '-v', '--gpu-name', match[1], path, '-o', folder / 'out.cubin']
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        for part in said.split('Compiling entry function ')[1:]:
            name, spilled, registers = (
                re.search(pattern, part)
                for pattern in (r"'(\w+)'", r'(\d+) bytes spill stores', r'Used (\d+) registers')
            )
            assert name and spilled and registers, f'ptxas says: {part}'
            if name[1].startswith('flash_attention'):
                found[name[1]] = int(registers[1]), int(spilled[1])
    return found


def main() -> None:
    """Compile each head size and print its kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--gpu', choices=GPUS, default='9.0', help='compute capability')
    parser.add_argument('--sizes', default='64,80,128,256', help='of heads, separated by commas')
    parser.add_argument('--length', type=int, default=4096)
    parser.add_argument('--plain', action='store_true', help='causal and packed only')
    parser.add_argument('--compile', type=int, help=argparse.SUPPRESS)  # one size, in a process with its own dumps
    arguments = parser.parse_args()
    if arguments.compile:
        from jax.experimental import topologies

        description = topologies.get_topology_desc(
            platform='cuda', target_config=target(arguments.gpu), topology='1x1x1'
        )
        print(compile_layer(description.devices[0], arguments.compile, arguments.length, arguments.plain))
        return
    parents = 'jax_plugins', 'nvidia'
    there = all(importlib.util.find_spec(name) for name in parents) and importlib.util.find_spec(
        'jax_plugins.xla_cuda12'
    )
    nvcc = importlib.util.find_spec('nvidia.cuda_nvcc') if there else None
    if nvcc is None:
        sys.exit('attention_gpu_registers.py needs jax-cuda12-plugin, jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12.')
    ptxas = Path(next(iter(nvcc.submodule_search_locations or []))) / 'bin' / 'ptxas'
    settings = {'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': '-1', 'TF_CPP_MIN_LOG_LEVEL': '3'}
    for size in arguments.sizes.split(','):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, f'--gpu={arguments.gpu}', f'--length={arguments.length}']
            command += [f'--compile={size}', *(['--plain'] if arguments.plain else [])]
            environment = os.environ | settings | {'XLA_FLAGS': f'--xla_dump_to={folder}'}
            run = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
            if run.returncode:
                sys.exit(f'head size {size}: {run.stderr.strip().splitlines()[-1]}')
            megabytes = int(run.stdout.split()[-1]) / 1e6
            print(f'compute capability {arguments.gpu}, head size {size}: temporaries {megabytes:.1f} MB')
            for name, (registers, spilled) in sorted(kernels(Path(folder), ptxas).items()):
                print(f'    {name}: {registers} registers, {spilled} bytes spilled', flush=True)


if __name__ == '__main__':
    main()
