"""GPT-2's spelling of bytes: one printable character for each (Radford et al. 2019, `encoder.py`)."""


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in GPT-2's files: itself, or from U+0100 on, in order."""
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    stands_for = {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    return [stands_for[byte] for byte in range(256)]


BYTE_ALPHABET = _byte_alphabet()
BYTE_OF = {character: byte for byte, character in enumerate(BYTE_ALPHABET)}


def spelt(content: bytes) -> str:
    """Bytes in the alphabet."""
    return ''.join(BYTE_ALPHABET[byte] for byte in content)
