"""What `xz -9` makes of the same bytes: the figure that a language model's bits per byte should beat.

A model of text is a compressor (Shannon 1948; Delétang et al. 2024, "Language Modeling Is Compression"): its bits per
byte on held-out text are the size that arithmetic coding with it would reach, so a compressor is a fair opponent.
"""

import lzma

from llm.errors import UserError

# Preset 9 has a dictionary of this size already; it is said again because the baseline is defined by it.
_FILTERS = [{'id': lzma.FILTER_LZMA2, 'preset': 9, 'dict_size': 64 * 2**20}]


def _xz_size(data: bytes) -> int:
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=_FILTERS))


def xz_baselines(train: bytes, validation: bytes) -> dict[str, float]:
    """Bits per byte of the validation bytes under xz, which sees them alone or after the training bytes.

    Primed is size(train + validation) - size(train): what the validation bytes add to a file when the compressor has
    just read the training bytes (the last 64 MB of them, its dictionary). This compresses about 1 MB a second on one
    core, without holding Python's lock, and takes 0.7 GB of memory: a thread beside the training will do.

    Args:
        train: all training files, concatenated. validation: all validation files, concatenated.

    Returns:
        xz_alone_bits_per_byte and xz_primed_bits_per_byte.

    Raises:
        UserError: there are no validation bytes.
    """
    if not validation:
        raise UserError('there are no validation bytes to compress', fix='Give the evaluation set some text.')
    alone = _xz_size(validation)
    primed = _xz_size(train + validation) - _xz_size(train)
    return {
        'xz_alone_bits_per_byte': 8 * alone / len(validation),
        'xz_primed_bits_per_byte': 8 * primed / len(validation),
    }
