"""Types of tensors in GGUF files: blocks of numbers that share scales, and what they stand for (ggml's ggml-quants.c).

Each function takes blocks as bytes, uint8 [blocks, bytes], and gives fp32 [blocks, numbers]; multiplications are in the
order of ggml's own code, so that results are equal to the bit.
"""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A type of tensor.

    Attributes:
        name: as llama.cpp prints it.
        code: in the file.
        numbers: in a block. size: of a block in bytes.
        dtype: of types that NumPy knows, whose blocks are single numbers.
        dequantize: of the others.
    """

    name: str
    code: int
    numbers: int
    size: int
    dtype: np.dtype | None = None
    dequantize: Callable[[np.ndarray], np.ndarray] | None = None

    def decode(self, data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor from its bytes, uint8: mapped still where NumPy knows the type, else in fp32."""
        if self.dtype is not None:
            return data.view(self.dtype).reshape(shape)
        assert self.dequantize is not None
        return self.dequantize(data.reshape(-1, self.size)).reshape(shape)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """A fp16 at a place of every block, fp32 [blocks, 1]."""
    return blocks[:, at : at + 2].copy().view('<f2').astype(np.float32)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """The lower halves of all bytes, then the upper."""
    return np.concatenate([data & 0xF, data >> 4], axis=-1)


def _fifth_bits(data: np.ndarray) -> np.ndarray:
    """32 bits of four bytes, each as 16."""
    return np.unpackbits(data, axis=-1, bitorder='little') << 4


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.int8) - np.int8(8)).astype(np.float32)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    numbers = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (numbers.astype(np.int8) - np.int8(16)).astype(np.float32)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    numbers = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * numbers.astype(np.float32) + _half(blocks, 2)


def _scales_and_offsets(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the eight parts of a 4- or 5-bit K block, fp32 [blocks, 8, 1]: 6-bit numbers packed into twelve bytes."""
    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([first & 0x3F, (third & 0xF) | ((first >> 2) & 0x30)], axis=1)
    offsets = np.concatenate([second & 0x3F, (third >> 4) | ((second >> 2) & 0x30)], axis=1)
    by_scale, by_offset = _half(blocks, 0), _half(blocks, 2)
    return (by_scale * scales.astype(np.float32))[..., None], (by_offset * offsets.astype(np.float32))[..., None]


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    scales, offsets = _scales_and_offsets(blocks)
    numbers = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return (scales * numbers.astype(np.float32) - offsets).reshape(len(blocks), 256)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    scales, offsets = _scales_and_offsets(blocks)
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return (scales * (low | (high << 4)).astype(np.float32) - offsets).reshape(len(blocks), 256)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    numbers = (low | (high << 4)).astype(np.int8) - np.int8(32)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (scales[..., None] * numbers.reshape(-1, 16, 16).astype(np.float32)).reshape(len(blocks), 256)


TYPES: tuple[BlockType, ...] = (
    BlockType('F32', 0, 1, 4, np.dtype('<f4')),
    BlockType('F16', 1, 1, 2, np.dtype('<f2')),
    BlockType('BF16', 30, 1, 2, np.dtype(ml_dtypes.bfloat16)),
    BlockType('Q4_0', 2, 32, 18, dequantize=_q4_0),
    BlockType('Q4_1', 3, 32, 20, dequantize=_q4_1),
    BlockType('Q5_0', 6, 32, 22, dequantize=_q5_0),
    BlockType('Q5_1', 7, 32, 24, dequantize=_q5_1),
    BlockType('Q8_0', 8, 32, 34, dequantize=_q8_0),
    BlockType('Q4_K', 12, 256, 144, dequantize=_q4_k),
    BlockType('Q5_K', 13, 256, 176, dequantize=_q5_k),
    BlockType('Q6_K', 14, 256, 210, dequantize=_q6_k),
)
BY_CODE = {each.code: each for each in TYPES}
BY_NAME = {each.name: each for each in TYPES}


def quantize_q8_0(x: np.ndarray) -> np.ndarray:
    """fp32 with rows of whole blocks as Q8_0, uint8: scale is the largest of 32 over 127, halves round away from 0."""
    parts = np.ascontiguousarray(x, np.float32).reshape(-1, 32)
    scale = np.abs(parts).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide='ignore'):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    scaled = parts * inverse
    rounded = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
    return np.concatenate([scale.astype('<f2').view(np.uint8), rounded.astype(np.int8).view(np.uint8)], axis=1)
