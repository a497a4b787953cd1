"""Bytes and seconds in words, with the unit that suits their size."""


def byte_size(size: float) -> str:
    """'12.34 GB', '350.9 MB', '1.2 KB'; of 10^9, 10^6 and 10^3 bytes."""
    if size >= 1e9:
        return f'{size / 1e9:.2f} GB'
    return f'{size / 1e6:.1f} MB' if size >= 1e6 else f'{size / 1e3:.1f} KB'


def duration(seconds: float) -> str:
    """'123.4 ms', '1.88 s'."""
    return f'{seconds:.2f} s' if seconds >= 1 else f'{1e3 * seconds:.1f} ms'
