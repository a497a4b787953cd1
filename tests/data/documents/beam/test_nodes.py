"""Keys of documents compare as what they are made of, and give it back."""

from hypothesis import given
from hypothesis import strategies as st

from llm.data.documents.beam.nodes import Position, identity_of, node, position, position_of

IDENTITIES = st.text(st.sampled_from('\0\1a\xff\U0001f600'), max_size=4)
NUMBERS = st.integers(0, (1 << 32) - 1)
PARTS = st.tuples(
    st.tuples(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(-1, 1)),
    IDENTITIES,
    st.binary(min_size=8, max_size=8),
    st.builds(Position, NUMBERS, NUMBERS, NUMBERS),
)


@given(PARTS, PARTS, st.booleans())
def test_keys_are_in_the_order_of_preference(one, other, same_places):
    if same_places:
        other = (one[0], *other[1:])
    assert (node(*one) < node(*other)) == (one < other)
    assert identity_of(node(*one), 2) == one[1] and position_of(node(*one)) == one[3]


def test_a_position_is_that_of_its_file():
    assert position(Position(7, 1_000_001, 3).name, 3) == Position(7, 1_000_001, 3)
