"""Batches of random tokens, for tests that train without files."""

import numpy as np

VOCABULARY, ROWS, LENGTH = 32, 8, 16


def random_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """A batch [ROWS, LENGTH] of two documents a row, with some padding."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[:, 9:] = 2
    segments[1, 12:] = segments[5, 14:] = 0
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    positions[:, 9:] -= 9
    weights = (segments > 0).astype(np.float32)
    return {
        'inputs': tokens[:, :-1],
        'targets': tokens[:, 1:],
        'loss_weights': weights,
        'segment_ids': segments,
        'positions': positions,
    }


class RandomBatches:
    """`batch(step)` as a loader gives it; they come again after `period` steps."""

    def __init__(self, period: int = 2, seed: int = 0):
        self.period, self.seed = period, seed

    def batch(self, step: int) -> dict[str, np.ndarray]:
        return random_batch(1000 * self.seed + step % self.period)
