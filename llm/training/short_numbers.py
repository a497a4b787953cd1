"""Numbers and times in few characters, for people."""


def short_duration(seconds: float) -> str:
    """Seconds as 0:07, 12:34, 5:06:07 or 3 d 04:05."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f'{hours // 24} d {hours % 24:02}:{minute:02}'
    return f'{hours}:{minute:02}:{second:02}' if hours else f'{minute}:{second:02}'


def short_number(value: float) -> str:
    """Three significant digits: 0.123, 5.99, 1.23k, 45.6M, 1.2e+20."""
    for size, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if size * 0.9995 <= abs(value) < size * 999.5:
            scaled = value / size
            return f'{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f}{letter}'
    return f'{value:.3g}'
