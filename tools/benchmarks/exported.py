"""Size and speed of an exported model: our jitted program beside onnxruntime's, on the CPU.

    python -m tools.benchmarks.exported [--width=512] [--layers=8] [--length=128]

Makes a Llama of the given shape with random parameters, exports it in a temporary folder, and prints the bytes of
graph and parameters, and milliseconds of a call: a whole row, and one token with a cache. The best of ten calls each.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm.interop.exporting.signatures import signatures
from llm.interop.exporting.stablehlo import load_programs
from llm.interop.exporting.writing import write_programs
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.initialization import initialize
from llm.models.layer import LayerConfig
from llm.models.parameters import named_specs, parameter_specs


def main() -> None:
    """Export, run, print."""
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (('width', 512), ('layers', 8), ('length', 128)):
        parser.add_argument(f'--{name}', type=int, default=default)
    given = parser.parse_args()
    mixer = AttentionConfig(given.width // 64, given.width // 64, 64)
    layer = LayerConfig(mixer, FeedForwardConfig(3 * given.width))
    config = DecoderConfig(32_000, given.width, given.layers, (layer,))
    specs = parameter_specs(config.build())
    values = initialize(specs, config.initialization, 0)
    parameters = jax.tree.leaves(values)
    flat = dict(zip((path for path, _ in named_specs(specs)), map(np.asarray, parameters), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        for to in ('onnx', 'jax_export'):
            directory = Path(folder) / to
            directory.mkdir()
            start = time.perf_counter()
            dtypes = dict.fromkeys(flat, 'float32')
            write_programs(directory, to, config, lambda path, index: flat[path][index], dtypes)  # type: ignore[arg-type]
            print(f'{to}: written in {time.perf_counter() - start:.1f} s')
            for file in sorted(directory.iterdir()):
                print(f'  {file.name}: {file.stat().st_size:,} bytes')
        loaded = load_programs(Path(folder) / 'jax_export')
        print('ms a call: jax, jax.export, onnxruntime')
        for program in signatures(config):
            arrays: dict[str, Any] = {}
            sizes = {'batch': 1, 'length': given.length if program.name == 'logits' else 1, 'room': given.length}
            for array in program.inputs:
                shape = [each if isinstance(each, int) else sizes[each] for each in array.shape]
                arrays[array.name] = np.ones(shape, array.dtype)
            session = onnxruntime.InferenceSession(str(Path(folder) / 'onnx' / f'{program.name}.onnx'))
            ours = jax.jit(program.run)
            runs: dict[str, Callable[[], Any]] = {
                'jax': lambda ours=ours, arrays=arrays: ours(flat, arrays),  # type: ignore[misc]
                'jax.export': lambda run=loaded[program.name], arrays=arrays: run(arrays),  # type: ignore[misc]
                'onnxruntime': lambda session=session, arrays=arrays: session.run(None, arrays),  # type: ignore[misc]
            }
            print(f'  {program.name}:', *(f'{_best(run):.1f}' for run in runs.values()))


def _best(run: Callable[[], Any]) -> float:
    """Milliseconds of the fastest of ten calls, after one that may compile."""
    jax.block_until_ready(run())
    found = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return 1e3 * min(found)


if __name__ == '__main__':
    main()
