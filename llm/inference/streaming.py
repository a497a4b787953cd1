"""From tokens to text as they come: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Iterator, Sequence

from llm.errors import UserError
from llm.inference.generation import Decoding


class TextStream:
    """The text of one row of tokens, given out as soon as it is certain.

    Characters whose bytes are still coming are held back, and so is what may become a stop string. The text ends where
    the first stop string to be complete begins; how the tokens were cut into calls makes no difference.

    Args:
        token_bytes: the bytes of every token by id.
        stop: strings that end the text.

    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        check_stop(stop)
        self._token_bytes = token_bytes
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self._held = ''
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens make certain."""
        return self._release(b''.join(self._token_bytes[token] for token in tokens), final=False)

    def close(self) -> str:
        """What was held back, at the end of the tokens; half a character becomes U+FFFD."""
        return self._release(b'', final=True)

    def _release(self, new: bytes, *, final: bool) -> str:
        if self.stopped:
            return ''
        text = self._held + self._decoder.decode(new, final)
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        kept = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def stream_text(decoding: Decoding, token_bytes: Sequence[bytes], stop: Sequence[str] = ()) -> Iterator[list[str]]:
    """New text of each row, each time that there are new tokens; rows that reach a stop string are ended."""
    streams = [TextStream(token_bytes, stop) for _ in decoding.ends]
    open_rows = set(range(len(streams)))
    for new in decoding:
        texts = [stream.push(tokens) for stream, tokens in zip(streams, new, strict=True)]
        for row in sorted(open_rows):
            if streams[row].stopped:
                decoding.finish(row)
            elif decoding.ends[row] is not None:
                texts[row] += streams[row].close()
        open_rows = {row for row in open_rows if decoding.ends[row] is None}
        yield texts


def check_stop(stop: Sequence[str]) -> None:
    """Raises UserError for a stop string that is empty, which every text contains."""
    if '' in stop:
        raise UserError('a stop string is empty', fix='Leave it out, or give it a character.')


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
