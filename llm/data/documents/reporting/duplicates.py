"""The largest groups of duplicates: the document that stays beside some that went for it, with what differs."""

import difflib
import re
from typing import Any

import numpy as np

from llm.data.documents.reporting.config import DataReport
from llm.data.documents.reporting.counting import Groups
from llm.data.documents.reporting.ledger import Ledger, Rows
from llm.data.documents.reporting.sampling import hashes

_MEMBERS = 3
# What of a text is compared; the rest of a long one is left out.
_WORDS = 1_000
# Equal words that are shown around a difference.
_AROUND = 12
_PIECES = re.compile(r'\S+\s*|\s+')


class Duplicates:
    """Groups by the document that stays for them; of very many, the large ones."""

    def __init__(self, ledger: Ledger, config: DataReport):
        self._ledger, self._config = ledger, config
        self._rules = [rule for rule in ledger.final_rules if rule != 'contamination']
        self._codes = [ledger.all_rules.index(rule) for rule in self._rules]
        self._groups = Groups(len(self._rules), 1)

    def add(self, rows: Rows) -> None:
        """Count a batch."""
        which = self._of(rows)
        if which.any():
            import pyarrow

            numbers = self._groups.numbers(rows.representatives.filter(pyarrow.array(which)))
            rules = np.searchsorted(self._codes, rows.outcomes[which])
            self._groups.add(numbers, rules, 0, weights=np.ones(len(numbers)))

    def _of(self, rows: Rows) -> np.ndarray:
        if rows.representatives is None:
            return np.zeros(len(rows.outcomes), np.bool_)
        has = rows.representatives.is_valid().to_numpy(zero_copy_only=False)
        return np.isin(rows.outcomes, self._codes) & has

    def as_json(self) -> list[dict[str, Any]]:
        """Groups of the most members first; reads the ledger's ids once more, and the texts that are shown."""
        largest = self._groups.items(self._config.duplicates)
        found = {name: counts[:, 0] for name, counts in largest if counts.any()}
        if not found:
            return []
        places = self._places(list(found))
        texts = self._texts([place for stays, members in places.values() for place in (stays, *members) if place])
        result = []
        for name, counts in found.items():
            stays, members = places[name]
            shown = texts.get(_key(stays)) if stays else None
            group: dict[str, Any] = {
                'id': name,
                'rules': {rule: int(n) for rule, n in zip(self._rules, counts, strict=True) if n},
                'source': stays['source'] if stays else None,
                'url': stays['url'] if stays else None,
                'text': ''.join(_PIECES.findall(shown or '')[:80]),
                'members': [],
            }
            for member in members:
                text = texts[_key(member)]
                shown_member = {key: member[key] for key in ('id', 'source', 'url', 'rule')}
                shown_member['differences'] = None if shown is None else differences(shown, text)
                group['members'].append(shown_member)
            result.append(group)
        return result

    def _places(self, names: list[str]) -> dict[str, tuple[dict[str, Any] | None, list[dict[str, Any]]]]:
        """name -> (the document that stays, members by a hash of their ids), as far as they are in this run."""
        import pyarrow
        import pyarrow.compute

        wanted = pyarrow.array(names, pyarrow.string())
        stays: dict[str, dict[str, Any]] = {}
        members: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for rows in self._ledger.batches(('id', 'source', 'url'), verdicts=False):
            there = rows.document_rows >= 0
            own = pyarrow.compute.is_in(rows.names['id'], wanted).to_numpy(zero_copy_only=False) & there
            for row in np.flatnonzero(own & (rows.outcomes == len(self._ledger.all_rules))).tolist():
                stays[rows.names['id'][row].as_py()] = self._place(rows, row)
            of = pyarrow.compute.is_in(rows.representatives, wanted).to_numpy(zero_copy_only=False) & self._of(rows)
            for row in np.flatnonzero(of).tolist():
                group = members[rows.representatives[row].as_py()]
                group.append(self._place(rows, row))
                group.sort(key=lambda place: place['hash'])
                del group[_MEMBERS:]
        return {name: (stays.get(name), members[name]) for name in names}

    def _place(self, rows: Rows, row: int) -> dict[str, Any]:
        place = {name: rows.names[name][row].as_py() for name in ('id', 'source', 'url')}
        outcome = int(rows.outcomes[row])
        rule = self._ledger.all_rules[outcome] if outcome < len(self._ledger.all_rules) else None
        order = int(hashes([place['id']], self._config.seed)[0])
        return {**place, 'rule': rule, 'shard': rows.shard, 'row': int(rows.document_rows[row]), 'hash': order}

    def _texts(self, places: list[dict[str, Any]]) -> dict[tuple[int, int], str]:
        texts: dict[tuple[int, int], str] = {}
        for shard in sorted({place['shard'] for place in places}):
            rows = sorted({place['row'] for place in places if place['shard'] == shard})
            texts |= {(shard, row): text for row, text in zip(rows, self._ledger.texts(shard, rows), strict=True)}
        return texts


def _key(place: dict[str, Any]) -> tuple[int, int]:
    return place['shard'], place['row']


def differences(first: str, second: str) -> list[list[str]]:
    """Pieces of two texts side by side: ['equal', text], ['changed', of the first, of the second], ['left_out', words].

    The first thousand words of each are compared; equal words that are far from a difference are left out.
    """
    a, b = (_PIECES.findall(text)[:_WORDS] for text in (first, second))
    words = [[piece.strip() for piece in pieces] for pieces in (a, b)]
    result: list[list[str]] = []
    codes = difflib.SequenceMatcher(None, words[0], words[1], autojunk=False).get_opcodes()
    for i, (code, a1, a2, b1, b2) in enumerate(codes):
        if code != 'equal':
            result.append(['changed', ''.join(a[a1:a2]), ''.join(b[b1:b2])])
            continue
        before = _AROUND if i > 0 else 0
        after = _AROUND if i < len(codes) - 1 else 0
        if len(codes) == 1:
            before = 4 * _AROUND
        if a2 - a1 <= before + after + 1:
            result.append(['equal', ''.join(a[a1:a2])])
            continue
        parts = [['equal', ''.join(a[a1 : a1 + before])], ['left_out', f'{a2 - a1 - before - after:,}']]
        result += [part for part in (*parts, ['equal', ''.join(a[a2 - after : a2])]) if part[1]]
    return result
