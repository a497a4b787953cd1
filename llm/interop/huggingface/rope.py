"""Rotary settings of config.json, in the form of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""

import math
from typing import Any

from llm.errors import UserError
from llm.interop.huggingface.settings import Settings
from llm.models.layer import MixerConfig
from llm.models.position import RotaryScaling

_KINDS = ('default', 'linear', 'dynamic', 'llama3', 'yarn', 'longrope')
# Of the scaling, besides its kind.
_NUMBERS = {
    'linear': ('factor',),
    'dynamic': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
    'yarn': ('factor', 'original_max_position_embeddings', 'attention_factor', 'beta_fast', 'beta_slow', 'mscale')
    + ('mscale_all_dim',),
    'longrope': ('factor', 'original_max_position_embeddings', 'attention_factor'),
    'default': (),
}
_REQUIRED = {
    'linear': ('factor',),
    'dynamic': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor'),
    'yarn': ('factor',),
}


def read_rope(
    settings: Settings,
    *,
    base: float = 10_000.0,
    fraction: float = 1.0,
    base_name: str = 'rope_theta',
    fraction_name: str = 'partial_rotary_factor',
    aliases: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The rotary fields of AttentionConfig.

    Args:
        base, fraction: where the file says nothing.
        base_name, fraction_name: of the settings that older files have.
        aliases: other names of 'longrope' (Phi-3).
    """
    base = settings.take(base_name, float, base)
    fraction = settings.take(fraction_name, float, fraction)
    found: dict[str, Any] = {}
    for name in ('rope_scaling', 'rope_parameters'):
        value = settings.raw(name)
        if value is not None and not isinstance(value, dict):
            raise settings.unsupported(name, 'not an object')
        found |= value or {}
    return rope_fields(settings, found, base, fraction, aliases)


def rope_fields(
    settings: Settings, values: dict[str, Any], base: float, fraction: float = 1.0, aliases: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The rotary fields of AttentionConfig from one object of rotary settings."""
    values = dict(values)
    kind = values.pop('rope_type', None) or values.pop('type', None) or 'default'
    values.pop('type', None)
    if kind in aliases:
        kind = 'longrope'
    if kind not in _KINDS:
        raise _unsupported(settings, 'rope_type', kind)
    base = _number(settings, values, 'rope_theta', base)
    fraction = _number(settings, values, 'partial_rotary_factor', fraction)
    longest = settings.take('max_position_embeddings', int, 0)
    original = settings.optional('original_max_position_embeddings', int)
    truncate = values.pop('truncate', True) if kind == 'yarn' else True
    factors = [_factors(settings, values, f'{name}_factor') if kind == 'longrope' else () for name in ('short', 'long')]
    numbers = {name: _number(settings, values, name, None) for name in _NUMBERS[kind] if name in values}
    for name in _REQUIRED.get(kind, ()):
        if numbers.get(name) is None:
            raise _unsupported(settings, name, None)
    if values:
        raise _unsupported(settings, *next(iter(values.items())))
    original = int(original or numbers.get('original_max_position_embeddings') or longest)
    factor = numbers.get('factor') or (longest / original if kind == 'longrope' and original else 1.0)
    scaling = RotaryScaling()
    match kind:
        case 'linear':
            scaling = RotaryScaling('linear', factor)
        case 'dynamic':
            scaling = RotaryScaling('dynamic', factor, longest)
        case 'llama3':
            low, high = numbers['low_freq_factor'], numbers['high_freq_factor']
            scaling = RotaryScaling('llama3', factor, original, low_frequency_factor=low, high_frequency_factor=high)
        case 'yarn':
            attention = numbers.get('attention_factor')
            if attention is None:
                # YaRN, eq. 22; DeepSeek's two are a quotient of such.
                scale, over = numbers.get('mscale'), numbers.get('mscale_all_dim')
                attention = mscale(factor, scale) / mscale(factor, over) if scale and over else mscale(factor, 1.0)
            fast, slow = numbers.get('beta_fast') or 32.0, numbers.get('beta_slow') or 1.0
            scaling = RotaryScaling(
                'yarn', factor, original, attention, beta_fast=fast, beta_slow=slow, truncate=bool(truncate)
            )
        case 'longrope':
            attention = numbers.get('attention_factor')
            if attention is None:
                attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            scaling = RotaryScaling(
                'longrope', factor, original, attention, short_factors=factors[0], long_factors=factors[1]
            )
    return {'rotary_base': base, 'rotary_fraction': fraction, 'rotary_scaling': scaling}


def write_rope(mixer: MixerConfig) -> dict[str, Any] | None:
    """The value of `rope_scaling`."""
    scaling = mixer.rotary_scaling
    original = {'original_max_position_embeddings': scaling.original_length}
    values: dict[str, Any]
    match scaling.kind:
        case 'none':
            return None
        case 'linear' | 'dynamic':
            return {'rope_type': scaling.kind, 'factor': scaling.factor}
        case 'llama3':
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            values = {'factor': scaling.factor, 'low_freq_factor': low, 'high_freq_factor': high}
        case 'yarn':
            values = {'factor': scaling.factor, 'attention_factor': scaling.attention_factor}
            values |= {'beta_fast': scaling.beta_fast, 'beta_slow': scaling.beta_slow, 'truncate': scaling.truncate}
        case 'longrope':
            factors = {'short_factor': [*scaling.short_factors], 'long_factor': [*scaling.long_factors]}
            values = {'factor': scaling.factor, 'attention_factor': scaling.attention_factor, **factors}
    return {'rope_type': scaling.kind, **values, **original}


def mscale(factor: float, scale: float) -> float:
    """YaRN's temperature for rows `factor` times as long, times `scale` in its exponent (DeepSeek's)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _number(settings: Settings, values: dict[str, Any], name: str, default: Any) -> Any:
    value = values.pop(name, None)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise _unsupported(settings, name, value)
    return float(value)


def _factors(settings: Settings, values: dict[str, Any], name: str) -> tuple[float, ...]:
    value = values.pop(name, None)
    if not isinstance(value, list) or not all(type(each) in (int, float) for each in value):
        raise _unsupported(settings, name, value)
    return tuple(map(float, value))


def _unsupported(settings: Settings, name: str, value: Any) -> UserError:
    return UserError(
        f'the rotary setting {name} is {value!r:.60}, which is not supported',
        where=settings.where,
        fix='This model cannot be converted as it is.',
    )
