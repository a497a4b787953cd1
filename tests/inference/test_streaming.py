"""Text as it streams: whole characters, nothing of a stop string, and the same however the tokens come."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import UserError
from llm.inference.streaming import TextStream

BYTES = [bytes([byte]) for byte in range(256)]


def texts(data, cuts=(), stop=()):
    """What a stream gives out for these bytes, one token each, pushed in parts that are cut there."""
    stream = TextStream(BYTES, stop)
    ends = [*sorted(cut for cut in cuts if cut < len(data)), len(data)]
    starts = [0, *ends[:-1]]
    return [*(stream.push(data[start:end]) for start, end in zip(starts, ends, strict=True)), stream.close()]


def test_characters_come_whole():
    assert texts('aé→😀b'.encode(), range(11)) == ['', 'a', '', 'é', '', '', '→', '', '', '', '😀', 'b', '']


def test_bytes_that_are_no_text_are_replaced():
    assert ''.join(texts(b'a\xffb\xc3', range(4))) == 'a�b�'
    assert texts('😀'.encode()[:3]) == ['', '�']


def test_tokens_may_hold_parts_of_characters():
    stream = TextStream([b'', b'x\xe2\x86', b'\x92y'])
    assert [stream.push([1, 0]), stream.push([2]), stream.close()] == ['x', '→y', '']


def test_what_may_become_a_stop_string_is_held_back():
    assert texts(b'one\n\ntwo', range(8), stop=['\n\n']) == ['', 'o', 'n', 'e', '', '', '', '', '', '']
    assert texts(b'a\nb\n', range(4), stop=['\n\n']) == ['', 'a', '', '\nb', '', '\n']
    assert texts(b'aab', range(3), stop=['aaa']) == ['', '', '', 'aab', '']


def test_a_stop_string_inside_a_token():
    stream = TextStream([b'def f():\n\nclass', b'!'], ['\n\n'])
    assert not stream.stopped
    assert stream.push([0, 1]) == 'def f():'
    assert stream.stopped
    assert [stream.push([1]), stream.close()] == ['', '']


def test_the_stop_string_that_is_complete_first_decides():
    assert ''.join(texts(b'xabcdy', stop=['bcd', 'abcd', 'c'])) == 'xab'
    assert ''.join(texts(b'xabcdy', stop=['bcd', 'abcd'])) == 'x'


@given(
    st.binary(max_size=12) | st.text('ab→\n', max_size=12).map(str.encode),
    st.sets(st.integers(0, 20)),
    st.lists(st.text('ab→\n', min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=500)
def test_the_same_text_however_the_tokens_come(data, cuts, stop):
    text = data.decode(errors='replace')
    ends = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    expected = text[: min(ends)[1]] if ends else text
    assert ''.join(texts(data, stop=stop)) == expected
    assert ''.join(texts(data, cuts, stop)) == expected
    assert ''.join(texts(data, range(len(data)), stop)) == expected


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match='a stop string is empty'):
        TextStream(BYTES, ['end', ''])
