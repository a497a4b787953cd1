"""Tokens that stand for no text: padding, beginning and end of a document, and what a user adds."""

import dataclasses

from llm.errors import UserError


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Names of the special tokens of a vocabulary to be trained; None leaves one out.

    They take the first ids, in the order pad, eos, unk (SentencePiece only), bos, extra. Text never encodes to them,
    even text that holds their names: only a program puts them in.

    Args:
        pad: fills a batch; weighs nothing in the loss.
        eos: ends a document.
        bos: begins a document.
        extra: any others, for example '<|user|>'.
    """

    pad: str | None = '<pad>'
    eos: str | None = '<eos>'
    bos: str | None = '<bos>'
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = self.names()
        for name in names:
            if not name or names.count(name) > 1:
                raise UserError(f'special token {name!r} is empty or given twice', fix='Give each its own name')

    def names(self, *, unk: str | None = None) -> list[str]:
        """The names in the order of their ids."""
        return [name for name in (self.pad, self.eos, unk, self.bos) if name is not None] + list(self.extra)
