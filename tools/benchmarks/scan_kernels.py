"""What the TPU compiler says of Mamba's scans, in Pallas and in plain XLA, at the sizes of published models.

    python tools/benchmarks/scan_kernels.py [--topology=v5e:2x2]

One layer, forward and backward: temporaries, bytes to and from HBM, and the VLIW bundles of each kernel, loops counted
once. Mamba-1.4B and Mamba-2 1.3B, one row of 2,048 tokens of packed documents in bf16. No TPU is needed.
"""

import argparse
import json
from typing import Any

from attention_kernels import run_and_count  # beside this file

LENGTH = 2048
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    'selective_scan': {
        'x': (1, LENGTH, 4096),
        'dt': (1, LENGTH, 4096),
        'a': (4096, 16),
        'b': (1, LENGTH, 16),
        'c': (1, LENGTH, 16),
    },
    'ssd': {
        'x': (1, LENGTH, 64, 64),
        'dt': (1, LENGTH, 64),
        'a': (64,),
        'b': (1, LENGTH, 1, 128),
        'c': (1, LENGTH, 1, 128),
    },
}


def compile_one(scan: str, implementation: str, topology: str) -> None:
    """Compile one and print its figures as JSON; the compiler leaves its dumps where it was told to."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from kernel_traffic import kernel_traffic  # beside this file

    from llm.kernels.selective_scan import selective_scan
    from llm.kernels.ssd import ssd
    from llm.scaling.program import hbm_bytes

    device = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ('one',)), PartitionSpec())
    arrays = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32 if name in ('dt', 'a') else jnp.bfloat16, sharding=sharding)
        for name, shape in SIZES[scan].items()
    }
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32, sharding=sharding)
    function: Any = {'selective_scan': selective_scan, 'ssd': ssd}[scan]

    def both(arrays: Any, ids: jax.Array, gradient: jax.Array) -> Any:
        def run(arrays: Any) -> jax.Array:
            y: jax.Array = function(**arrays, segment_ids=ids, device=device, implementation=implementation)[0]
            return y

        y, pullback = jax.vjp(run, arrays)
        return y, pullback(gradient)

    arguments = arrays, ids, arrays['x']
    compiled = jax.jit(both).lower(*arguments).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    kernels = kernel_traffic(both, *arguments) if implementation == 'pallas_tpu' else []
    figures = {
        'temporaries': memory.temp_size_in_bytes,
        'program': hbm_bytes(text),
        'kernels': {each.name: each.total for each in kernels},
    }
    print(json.dumps(figures))


def main() -> None:
    """Compile each in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--topology', default='v5e:2x2')
    parser.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        scan, implementation = arguments.one
        compile_one(scan, implementation, arguments.topology)
        return
    for scan in SIZES:
        for implementation in ('pallas_tpu', 'chunked'):
            script = [__file__, f'--topology={arguments.topology}', '--one', scan, implementation]
            done, counts = run_and_count(script)
            done.check_returncode()
            figures = json.loads(done.stdout.splitlines()[-1])
            print(
                f'{scan}, {implementation}: temporaries {figures["temporaries"] / 1e6:.1f} MB, '
                f'HBM with each operand of a kernel once {figures["program"] / 1e6:.1f} MB'
            )
            for name, moved in figures['kernels'].items():
                count = next((count for dumped, count in counts.items() if name in dumped), None)
                print(f'    {name}: HBM {moved / 1e6:.1f} MB, {count} bundles')


if __name__ == '__main__':
    main()
