"""Any text inside HTML: what a model samples and what a bad record holds may be anything."""

import html
import re
from typing import Any


def escape(text: Any) -> str:
    """`text` for an element or a quoted attribute.

    What HTML cannot hold (control characters, lone surrogates) and what would reverse the text after it (overrides of
    the writing direction) become visible symbols.
    """
    visible = re.sub(r'[\x00-\x08\x0b-\x1f]', lambda match: chr(0x2400 + ord(match[0])), str(text))
    visible = re.sub('[\x7f-\x9f\u202d\u202e\ud800-\udfff\ufffe\uffff]', '\N{REPLACEMENT CHARACTER}', visible)
    return html.escape(visible)
