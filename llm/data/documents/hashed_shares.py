"""Chance that is the same in every run: numbers that are drawn by hashing what they are for."""

import hashlib


def hashed_share(*parts: str) -> float:
    """A number in [0, 1) that these texts draw together: the purpose with its seed, then what it is drawn for.

    64 bits of BLAKE2b, of which a float holds 53, so 1 is never reached.
    """
    digest = hashlib.blake2b('\0'.join(parts).encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53
