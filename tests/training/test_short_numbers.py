import pytest

from llm.training.short_numbers import short_duration, short_number


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0.4, '0:00'), (59.6, '1:00'), (754, '12:34'), (18367, '5:06:07'), (273900, '3 d 04:05'), (-3, '0:00')],
)
def test_durations(seconds, text):
    assert short_duration(seconds) == text


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (0.1234, '0.123'),
        (5.987, '5.99'),
        (999.4, '999'),
        (999.6, '1.00k'),
        (1234, '1.23k'),
        (45600, '45.6k'),
        (999_600, '1.00M'),
        (123_456_789, '123M'),
        (-4200, '-4.20k'),
        (3e12, '3.00T'),
        (1.2e20, '1.2e+20'),
        (0, '0'),
    ],
)
def test_numbers(value, text):
    assert short_number(value) == text
