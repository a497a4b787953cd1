"""Pages nested deeper than parsers bear: extraction takes time that grows with the square of the depth, or for ever.

Others bound the tree, too: Blink at 512 elements, libxml2 at 256. Likewise here: tags that would open a deeper element
are taken out with those that close it, and what they enclose stays.
"""

import re
from collections import Counter

# Elements within each other (libxml2's xmlParserMaxDepth). Lists, each of which indents its lines further.
# Open formatting elements: a parser opens them anew in each block that follows, so that the tree holds the product.
MAX_DEPTH, MAX_LISTS, MAX_FORMATTING = 256, 32, 8
# A page with fewer tags, or nearly all of them closed, costs seconds at the worst and is not looked through.
_FEW_TAGS, _FEW_OPENING, _FEW_UNCLOSED = 3000, 4000, 1000


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FORMATTING = _names('b big code em font i nobr s small strike strong tt u')
_LISTS = _names('ol ul menu dir dl')
_VOID = _names('area base basefont bgsound br col embed frame hr img input keygen link meta param source track wbr')
# An end tag of another element finds nothing behind these (WHATWG HTML, 13.2.6.4.7, "any other end tag").
_SPECIAL = _names(
    'address applet article aside blockquote button caption center dd details dir div dl dt fieldset figcaption figure '
    'footer form h1 h2 h3 h4 h5 h6 header hgroup li listing main marquee menu nav object ol p pre section select '
    'summary table tbody td template tfoot th thead tr ul'
)
_SCOPES = _names('applet caption marquee object table td template th')
_OF_TABLES = _names('caption tbody td tfoot th thead tr')
_KEEP_PARTS = _names('table svg math')
# Ended by the next of their kind. A paragraph is ended by any block, too.
_SIBLINGS = {
    name: _names(group)
    for group in ('li', 'dd dt', 'option optgroup', 'td th', 'tr', 'tbody tfoot thead')
    for name in group.split()
}
_TAG = re.compile(
    r'<!--.*?(?:-->|\Z)|<(?:script|style|textarea|title|xmp)\b.*?(?:</(?:script|style|textarea|title|xmp)|\Z)'
    r'|<(/?)([a-z][^\s/>]*)[^>]*>?',
    re.S | re.I,
)


def flattened(markup: str) -> str:
    """The page without the tags that nest too deeply; the same string if there are none. Linear in its length."""
    tags = markup.count('<')
    if tags <= _FEW_TAGS:
        return markup
    opening = tags - (closing := markup.count('</'))
    if opening <= _FEW_OPENING and opening - closing <= _FEW_UNCLOSED:
        return markup
    open_elements: list[str] = []
    formatting: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    parts: list[str] = []
    kept = 0  # the end of what has been looked at and is in `parts`
    for match in _TAG.finditer(markup):
        name, drop = match[2], False
        if name is None:
            continue
        name = name.lower()
        if name in _VOID or (name in _OF_TABLES and _KEEP_PARTS.isdisjoint(open_elements)):  # what is not opened
            continue
        if match[1]:
            drop = dropped[name] > 0
            if drop:
                dropped[name] -= 1
            elif name in _FORMATTING:
                formatting[name] = max(0, formatting[name] - 1)
            else:
                _close(open_elements, name)
        elif name in _FORMATTING:
            drop = formatting.total() >= MAX_FORMATTING
            if not drop:
                formatting[name] += 1
        elif name != 'a' or 'a' not in open_elements:  # a link ends the one before it
            if open_elements and (
                open_elements[-1] in _SIBLINGS.get(name, ()) or (open_elements[-1] == 'p' and name in _SPECIAL)
            ):
                open_elements.pop()
            drop = len(open_elements) >= MAX_DEPTH or (
                name in _LISTS and sum(map(open_elements.count, _LISTS)) >= MAX_LISTS
            )
            if not drop:
                open_elements.append(name)
        if drop:
            if not match[1]:
                dropped[name] += 1
            parts.append(between := markup[kept : match.start()])
            if name in _SPECIAL and between and not between.isspace():  # what a block separated stays separate
                parts.append('<br>')
            kept = match.end()
    return ''.join([*parts, markup[kept:]]) if parts else markup


def _close(open_elements: list[str], name: str) -> None:
    """Ends the innermost element of a name, and all within it, where a parser finds it."""
    bounds = ('table',) if name in _OF_TABLES else _SCOPES if name in _SPECIAL else _SPECIAL
    for i in range(len(open_elements) - 1, -1, -1):
        if open_elements[i] == name:
            del open_elements[i:]
            return
        if open_elements[i] in bounds:
            return
