"""Rotary scaling in GGUF files, both ways: the keys `rope.scaling.*`, and tensors of factors that divide frequencies.

llama.cpp (llama-context.cpp) computes YaRN's temperature from the factor and multiplies it by `attn_factor`; it reads
the ends of YaRN's ramp of no architecture here, so they are 32 and 1. Of LongRoPE it takes one of two tensors, by the
room of the cache. Llama 3.1's five numbers are in no key: a tensor has the factors that they give.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm.errors import UserError
from llm.interop.huggingface.rope import mscale
from llm.interop.loading import Tensor
from llm.models.position import Rotary, RotaryScaling

FREQUENCIES, LONG, SHORT = (f'rope_{name}.weight' for name in ('freqs', 'factors_long', 'factors_short'))
TENSORS = (FREQUENCIES, LONG, SHORT)
START = 'rope.scaling.'
# Of keys that are not read, the values that change nothing.
_EXPECTED = {'yarn_ext_factor': 1.0, 'yarn_beta_fast': 32.0, 'yarn_beta_slow': 1.0}


def read_scaling(
    keys: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    length: int,
    size: int,
    base: float,
    where: str,
) -> dict[str, Any] | None:
    """`rope_scaling` of config.json.

    Args:
        keys: without `START`.
        length: that the model was made for. size: rotated dimensions. base: see Rotary.

    Raises:
        UserError: scaling is of a kind, or has a number, that is not supported.
    """
    values = {key: plain(value) for key, value in keys.items() if key != 'finetuned'}
    kind = values.pop('type', 'none' if values.get('factor', 1.0) == 1.0 else 'linear')
    original = values.pop('original_context_length', length)
    factor, attention = values.pop('factor', 1.0), values.pop('attn_factor', 1.0)
    over = values.pop('yarn_log_multiplier', None)
    stated = values.pop('yarn_attn_factor', None)
    unknown = {key: value for key, value in values.items() if value != _EXPECTED.get(key)}
    numbers = (original, factor, attention, 0.0 if over is None else over)
    sound = all(type(each) in (int, float) and math.isfinite(each) for each in numbers) and original > 0 and factor > 0
    if kind not in ('none', 'linear', 'yarn', 'longrope') or unknown or not sound:
        raise _unsupported(keys, where)
    if FREQUENCIES in tensors:
        if kind not in ('none', 'linear') or factor != 1.0:
            raise _unsupported(keys, where)
        return _from_factors(_read(tensors[FREQUENCIES], size, where), length, size, base)
    if kind == 'longrope' or LONG in tensors:
        if LONG not in tensors or SHORT not in tensors or kind == 'yarn':
            raise _unsupported(keys, where)
        times = length / original
        usual = math.sqrt(1 + math.log(times) / math.log(original)) if times > 1 else 1.0
        factors = {
            name: [*map(float, _read(tensors[each], size, where))]
            for name, each in (('long_factor', LONG), ('short_factor', SHORT))
        }
        return {
            'rope_type': 'longrope',
            'factor': times,
            'original_max_position_embeddings': original,
            'attention_factor': _near(attention, usual),
            **{name: [plain(each) for each in some] for name, some in factors.items()},
        }
    if kind == 'yarn':
        scale = attention * mscale(factor, 1.0)
        if stated is not None and not math.isclose(stated, scale, rel_tol=1e-5):
            raise _unsupported(keys, where)
        if over is not None:
            over = round(over * 10, 6)
            return {'rope_type': 'yarn', 'factor': factor, 'original_max_position_embeddings': original} | (
                {'mscale': over, 'mscale_all_dim': over}
            )
        scale = _near(scale, mscale(factor, 1.0), float(f'{scale:.5g}'))
        return {'rope_type': 'yarn', 'factor': factor, 'attention_factor': scale} | (
            {'original_max_position_embeddings': original}
        )
    if kind == 'none' or factor == 1.0:
        return None
    return {'rope_type': 'linear', 'factor': factor}


def write_scaling(
    rotary: Rotary, length: int, *, factors: bool, over: float | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys with `START`, and tensors.

    Args:
        length: of the rows that the model was trained on.
        factors: whether the architecture has tensors of factors.
        over: YaRN's temperature that stands in the scores and not in the rotation (DeepSeek's `mscale_all_dim`).

    Raises:
        UserError: llama.cpp has no such scaling.
    """
    scaling = rotary.scaling
    keys: dict[str, Any] = {}
    tensors: dict[str, np.ndarray] = {}
    supported = scaling.kind in ('none', 'linear', 'yarn') or (factors and scaling.kind in ('llama3', 'longrope'))
    usual = scaling.beta_fast == 32.0 and scaling.beta_slow == 1.0 and scaling.truncate
    if not supported or (scaling.kind == 'yarn' and not usual):
        raise UserError(
            f'rotary scaling {scaling.kind!r} of this kind cannot be written to a GGUF file',
            where='AttentionConfig.rotary_scaling',
            fix='llama.cpp has no such scaling for this architecture: export it to a Hugging Face directory.',
        )
    if scaling.kind in ('linear', 'yarn', 'longrope'):
        keys['type'] = scaling.kind
    if scaling.kind in ('linear', 'yarn'):
        keys['factor'] = scaling.factor
    if scaling.kind in ('yarn', 'longrope'):
        keys['original_context_length'] = scaling.original_length
    if scaling.kind == 'yarn' and over is not None:
        keys['yarn_log_multiplier'] = 0.1 * over
    elif scaling.kind == 'yarn':
        keys['attn_factor'] = scaling.attention_factor / mscale(scaling.factor, 1.0)
    if scaling.kind == 'longrope':
        keys['attn_factor'] = scaling.attention_factor
        tensors[LONG] = np.asarray(scaling.long_factors, np.float32)
        tensors[SHORT] = np.asarray(scaling.short_factors, np.float32)
    if scaling.kind == 'llama3':
        tensors[FREQUENCIES] = np.asarray(1 / rotary.slowing(length), np.float32)
    return {f'{START}{key}': value for key, value in keys.items()}, tensors


def plain(value: Any) -> Any:
    """fp32, of numbers that were written down in decimal: 1e-05, not 9.999999747378752e-06."""
    return float(f'{value:.7g}') if isinstance(value, float) else value


def _from_factors(factors: np.ndarray, length: int, size: int, base: float) -> dict[str, Any]:
    """The scaling of Llama 3.1 that gives these factors, if there is one as all its models have it."""
    factor = plain(float(factors.max()))
    for power in range(4, 21) if factor >= 1 else ():
        scaling = RotaryScaling('llama3', factor, 1 << power, low_frequency_factor=1.0, high_frequency_factor=4.0)
        if np.allclose(1 / Rotary(size, base, 1.0, scaling).slowing(length), factors, rtol=1e-6, atol=0):
            numbers = {'factor': factor, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
            return {'rope_type': 'llama3', **numbers, 'original_max_position_embeddings': 1 << power}
    own = [float(each) for each in factors]
    both = {'short_factor': own, 'long_factor': own, 'attention_factor': 1.0, 'factor': 1.0}
    return {'rope_type': 'longrope', **both, 'original_max_position_embeddings': length}


def _read(tensor: Tensor, size: int, where: str) -> np.ndarray:
    factors = np.asarray(tensor.read(), np.float64).reshape(-1)
    if len(factors) != size // 2 or not np.isfinite(factors).all() or not (factors > 0).all():
        raise UserError(
            f'has {len(factors)} rotary factors, and {size // 2} positive ones are needed',
            where=where,
            fix='Get the file again, from where it was made.',
        )
    return factors


def _near(value: float, usual: float, otherwise: float | None = None) -> float:
    """`usual`, where the value is that but for rounding to fp32."""
    return usual if math.isclose(value, usual, rel_tol=1e-6) else value if otherwise is None else otherwise


def _unsupported(keys: Mapping[str, Any], where: str) -> UserError:
    return UserError(f'rope.scaling is {dict(keys)!r:.80}', where=where, fix='This scaling is not supported.')
