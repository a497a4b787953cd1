"""cuDNN's fused attention through `jax.nn`, for what it can do. Its backward pass adds up in no fixed order.

It knows neither segments nor sinks, soft caps or ALiBi, and takes whole rows from their first token on.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llm.errors import UserError
from llm.kernels.attention.flash import Inputs
from llm.kernels.attention.masking import Options, Positions
from llm.kernels.attention.pallas_gpu import check_gpu, where

_HOPPER = 9  # compute capability from which heads may be 256 wide


def _obstacle(options: Options, inputs: Inputs, gpu: str) -> str | None:
    """The first thing that cuDNN cannot do, or None."""
    (query, key, _, positions), sinks = inputs.arrays, inputs.sinks
    head_size, most = query.shape[3], 256 if int(gpu.partition('.')[0]) >= _HOPPER else 128
    obstacles = {
        f'{query.dtype} arrays (only bfloat16 and float16)': query.dtype not in (jnp.bfloat16, jnp.float16),
        f'{query.dtype} queries with {key.dtype} keys': query.dtype != key.dtype,
        f'head size {head_size} (only multiples of 8 up to {most})': head_size % 8 or head_size > most,
        'a soft cap': options.soft_cap is not None,
        'ALiBi': positions.slopes is not None,
        'sinks': sinks is not None,
        'segment ids, which packed rows have': positions.query_ids is not None,
        'a query offset': options.offset != 0,
        'a window without the causal mask': options.window is not None and not options.causal,
        # A query could then be left without any key, for which it promises nothing.
        'a window together with key lengths': options.window is not None and positions.key_lengths is not None,
    }
    return next((name for name, there in obstacles.items() if there), None)


def jax_arguments(options: Options, positions: Positions, keys: int) -> dict[str, Any]:
    """What `jax.nn.dot_product_attention` is to be told besides the arrays."""
    lengths = positions.key_lengths
    return {
        'scale': options.scale,
        'is_causal': options.causal,
        # Rows without a key are worked out with one, and then left out of the result and of the gradients.
        'key_value_seq_lengths': None if lengths is None else jnp.clip(lengths, 1, keys).astype(jnp.int32),
        'local_window_size': None if options.window is None else (options.window - 1, 0),
    }


def attention(options: Options, inputs: Inputs, *, gpu: str | None) -> jax.Array:
    """Attention by cuDNN.

    Args:
        gpu: compute capability of the GPU that will run it, as '9.0'; None if it is no NVIDIA GPU.

    Raises:
        UserError: the device is no NVIDIA GPU from Ampere on, or cuDNN cannot do what is asked for.
    """
    gpu = check_gpu('cudnn', gpu)
    obstacle = _obstacle(options, inputs, gpu)
    if obstacle is not None:
        raise UserError(f'cannot do {obstacle}', where=where('cudnn'), fix="Use 'pallas_gpu' or 'auto'.")
    query, key, value, positions = inputs.arrays
    output = jax.nn.dot_product_attention(
        query, key, value, **jax_arguments(options, positions, key.shape[1]), implementation='cudnn'
    )
    if positions.key_lengths is None:
        return output
    return jnp.where(positions.key_lengths[:, None, None, None] > 0, output, 0)
