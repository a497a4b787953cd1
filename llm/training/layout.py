"""Where the tokens of a batch go on the mesh, and in which order they lie there."""

import jax
import numpy as np

from llm.kernels.attention.sequence_axis import zigzag_order
from llm.parallel.sharding import constrain, sequence_cut


def token_order(length: int) -> np.ndarray | None:
    """Index in the row of each token, where devices share rows and their tokens do not lie in order; else None."""
    cut = sequence_cut()
    return zigzag_order(length, cut.pieces) if cut is not None and cut.zigzag(length) else None


def placed(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A batch of arrays [B, S] on the mesh, its tokens in `token_order`, which each array's length S decides."""
    orders = {name: token_order(x.shape[1]) for name, x in batch.items()}
    return {
        name: constrain(x if orders[name] is None else x[:, orders[name]], ('batch', 'sequence'))
        for name, x in batch.items()
    }
