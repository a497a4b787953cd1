"""Quantized types against the `gguf` package, to the bit."""

import gguf
import numpy as np
import pytest
from gguf import quants

from llm.interop.gguf.blocks import TYPES, BlockType, quantize_q8_0


@pytest.mark.parametrize('kind', TYPES, ids=lambda kind: kind.name)
def test_every_type_has_the_package_s_size_and_numbers(kind: BlockType):
    theirs = gguf.GGMLQuantizationType[kind.name]
    assert theirs.value == kind.code
    assert gguf.GGML_QUANT_SIZES[theirs] == (kind.numbers, kind.size)
    blocks = np.random.default_rng(0).integers(0, 256, (400, kind.size), np.uint8)
    with np.errstate(all='ignore'):  # some of these scales are infinite
        ours = kind.decode(blocks.reshape(-1), (400, kind.numbers)).astype(np.float32)
        expected = quants.dequantize(blocks, theirs).reshape(400, kind.numbers)
    assert np.isfinite(ours).mean() > 0.5
    assert np.array_equal(ours, expected, equal_nan=True)


def test_q8_0_is_quantized_as_the_package_does():
    x = np.random.default_rng(1).standard_normal((64, 96), np.float32)
    x[3] = 0
    x[5, :32] = np.arange(32) + 0.5  # halves
    x[5, 31] = 127
    ours = quantize_q8_0(x)
    assert np.array_equal(ours.reshape(64, -1), quants.quantize(x, gguf.GGMLQuantizationType.Q8_0))
