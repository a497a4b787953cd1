"""Host memory and time of converting a large Hugging Face checkpoint: to a run directory, back, and onto a mesh.

    python tools/benchmarks/converting.py --gigabytes=4 [--layers=32] [--mesh] [--folder=/tmp/converting]

The checkpoint is a Llama in bfloat16 whose files are holes but for their headers, so that it takes no disk; what is
written of it does. Each conversion is a process of its own, whose peak of resident memory (VmHWM) is printed; pages of
mapped files count, so it is more than what could not be given back. `--mesh` also loads it onto eight simulated
devices, whose memory is the host's: there the peak is the model and what is needed beside it.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

_VOCAB, _HEAD, _FILES = 32_000, 128, 8

_CONVERT = """
from llm.configuration import Invocation
from llm.jobs.convert import Convert
Convert({source!r}, {destination!r}, to={to!r})(Invocation(False, '', (), ()))
"""
_LOAD = """
import jax.numpy as jnp
from llm.interop.huggingface.directory import open_directory
from llm.interop.loading import load_parameters
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules
checkpoint = open_directory({source!r})
mesh = make_mesh(MeshConfig(fsdp=8))
parameters = load_parameters(checkpoint.pieces, checkpoint.specs, mesh, AxisRules(), jnp.bfloat16)
"""
_REPORT = """
import resource, sys
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def sparse_checkpoint(directory: Path, gigabytes: float, layers: int) -> int:
    """Write it; returns its bytes. The width is the multiple of a head that comes closest to the size."""
    # 12 d^2 for each layer, 2 V d outside: two bytes each.
    b, c = _VOCAB * 2, -gigabytes * 5e8
    width = round((-b + math.sqrt(b * b - 48 * layers * c)) / (24 * layers) / _HEAD) * _HEAD
    wide = round(8 * width / 3 / _HEAD) * _HEAD
    attention, mlp = (width, width), (wide, width)
    shapes: dict[str, tuple[int, ...]] = {'model.embed_tokens.weight': (_VOCAB, width)}
    for i in range(layers):
        start = f'model.layers.{i}'
        shapes |= {f'{start}.self_attn.{name}_proj.weight': attention for name in 'qkvo'}
        shapes |= {f'{start}.mlp.{name}_proj.weight': mlp for name in ('gate', 'up')}
        shapes |= {f'{start}.mlp.down_proj.weight': mlp[::-1]}
        shapes |= {f'{start}.{name}_layernorm.weight': (width,) for name in ('input', 'post_attention')}
    shapes |= {'model.norm.weight': (width,), 'lm_head.weight': (_VOCAB, width)}
    names = list(shapes)
    step = -(-len(names) // _FILES)
    places, total = {}, 0
    directory.mkdir(parents=True)
    for number in range(_FILES):
        file = f'model-{number + 1:05}-of-{_FILES:05}.safetensors'
        header: dict[str, object] = {}
        end = 0
        for name in names[number * step : (number + 1) * step]:
            size = 2 * math.prod(shapes[name])
            header[name] = {'dtype': 'BF16', 'shape': shapes[name], 'data_offsets': [end, end + size]}
            end += size
            places[name] = file
        text = json.dumps(header).encode()
        with (directory / file).open('wb') as out:
            out.write(len(text).to_bytes(8, 'little') + text)
            out.truncate(8 + len(text) + end)
        total += end
    (directory / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': places}))
    settings = {
        'model_type': 'llama',
        'vocab_size': _VOCAB,
        'hidden_size': width,
        'num_hidden_layers': layers,
        'num_attention_heads': width // _HEAD,
        'intermediate_size': wide,
    }
    (directory / 'config.json').write_text(json.dumps(settings))
    return total


def measure(title: str, program: str, size: int) -> None:
    """Run it in a process of its own and print its peak."""
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
        'PYTHONPATH': str(Path(__file__).parents[2]),
    }
    ran = subprocess.run(
        [sys.executable, '-c', program + _REPORT], env=environment, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise SystemExit(ran.stderr)
    peak = int(ran.stderr.split()[-1]) * 1024
    print(f'{title:28}model {size / 1e9:6.2f} GB, peak {peak / 1e9:5.2f} GB   {ran.stdout.strip()}', flush=True)


def main() -> None:
    """Measure what the flags say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else '')
    parser.add_argument('--gigabytes', type=float, default=4.0)
    parser.add_argument('--layers', type=int, default=32)
    parser.add_argument('--folder', type=Path, default=Path('/tmp/converting'))
    parser.add_argument('--mesh', action='store_true')
    flags = parser.parse_args()
    source, run, back = (str(flags.folder / name) for name in ('source', 'run', 'back'))
    size = sparse_checkpoint(Path(source), flags.gigabytes, flags.layers)
    measure('nothing (imports)', 'import llm.jobs.convert, orbax.checkpoint, jax; jax.devices()', 0)
    if flags.mesh:
        measure('onto eight devices', _LOAD.format(source=source), size)
    measure('to a run directory', _CONVERT.format(source=source, destination=run, to='run'), size)
    measure('to a Hugging Face directory', _CONVERT.format(source=run, destination=back, to='hugging_face'), size)


if __name__ == '__main__':
    main()
