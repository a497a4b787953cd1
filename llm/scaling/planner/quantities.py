"""Figures of a plan in words: bytes and seconds with the unit that suits their size, and counts."""


def byte_size(size: float) -> str:
    """'12.34 GB', '350.9 MB', '1.2 KB'; of 10^9, 10^6 and 10^3 bytes."""
    if size >= 1e9:
        return f'{size / 1e9:.2f} GB'
    return f'{size / 1e6:.1f} MB' if size >= 1e6 else f'{size / 1e3:.1f} KB'


def duration(seconds: float) -> str:
    """'1.88 s', '123.4 ms', '56.7 us'."""
    if seconds >= 1:
        return f'{seconds:.2f} s'
    return f'{1e3 * seconds:.1f} ms' if seconds >= 1e-3 else f'{1e6 * seconds:.1f} us'


def microbatches(count: int) -> str:
    """'1 microbatch', '8 microbatches'."""
    return f'{count} microbatch{"es" if count > 1 else ""}'
