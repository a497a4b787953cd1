import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm.training.progress import Progress, metrics_line, scores_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def frames(self) -> list[str]:
        """What was drawn, frame by frame."""
        return [frame.rstrip() for frame in re.split(r'[\r\n]', self.getvalue()) if frame.strip()]


TRAIN = {'loss': 2.3456, 'tokens_per_second': 6123.4, 'mfu': 0.384, 'learning_rate': 0.1}
SCORES = {'held_out/loss': 2.5, 'held_out/bits_per_byte': 1.7024, 'books/loss': 3.25}


def run(stream: io.StringIO, total: int, start: int = 0) -> None:
    with Progress(total, start, stream=stream) as progress:
        for step in range(start + 1, total + 1):
            progress.update(step, TRAIN)
            if step == total:
                progress.update(step, SCORES)
        progress.say('saved step 6\nand more')


def test_terminal_shows_everything_on_one_line():
    terminal = Terminal()
    run(terminal, total=6)
    last = terminal.frames()[-1]
    assert last.startswith('6/6 100%|')
    assert '| loss 2.346  6.12k tok/s  MFU 38%  0:00 left  held_out 1.702 bits/byte  books loss 3.250' in last
    assert {'saved step 6', 'and more'} < set(terminal.frames())


def test_resumed_run_starts_where_it_was():
    terminal = Terminal()
    run(terminal, total=8, start=6)
    assert terminal.frames()[0].startswith('6/8  75%|')
    assert terminal.frames()[-1].startswith('8/8 100%|')


def test_file_gets_whole_lines_and_no_control_characters():
    file = io.StringIO()
    run(file, total=1000)
    lines = file.getvalue().splitlines()
    assert '\r' not in file.getvalue()
    assert lines[0] == 'step 1/1,000 (0%)  loss 2.346  6.12k tok/s  MFU 38%'
    assert lines[-4] == 'step 1,000/1,000 (100%)  loss 2.346  6.12k tok/s  MFU 38%  0:00 left'
    assert lines[-3:] == [
        'step 1,000/1,000  evaluation  held_out 1.702 bits/byte  books loss 3.250',
        'saved step 6',
        'and more',
    ]


def test_disabled_shows_nothing():
    stream = Terminal()
    with Progress(3, enabled=False, stream=stream) as progress:
        progress.update(1, TRAIN)
        progress.say('nothing')
    assert stream.getvalue() == ''


def test_the_line_stays_after_an_error():
    terminal = Terminal()
    with pytest.raises(KeyboardInterrupt), Progress(3, stream=terminal) as progress:
        progress.update(1, TRAIN)
        raise KeyboardInterrupt
    assert terminal.frames()[-1].startswith('1/3  33%|')
    assert terminal.getvalue().endswith('\n')


def test_unknown_figures_are_left_out():
    assert metrics_line({'loss': 1.0}) == 'loss 1.000'
    assert metrics_line({}) == ''
    assert scores_line({'a/tokens': 7.0}) == ''


def test_terminal_is_recognised(tmp_path):
    """Under a pseudo-terminal of 90 columns no frame is wider than the window, and the process ends cleanly."""
    program = (
        'import os, pty, sys, fcntl, struct, termios\n'
        'child, fd = pty.fork()\n'
        'if child == 0:\n'
        '    from llm.training.progress import Progress\n'
        '    fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 90, 0, 0))\n'
        '    with Progress(4) as progress:\n'
        '        for step in range(1, 5):\n'
        '            progress.update(step, {"a_set_with_a_very_long_name/loss": 3.0, "b/loss": 4.0, "loss": 2.0})\n'
        '    os._exit(0)\n'
        'output = b""\n'
        'while True:\n'
        '    try: chunk = os.read(fd, 65536)\n'
        '    except OSError: break\n'
        '    if not chunk: break\n'
        '    output += chunk\n'
        'import json; print(json.dumps([os.waitpid(child, 0)[1], output.decode()]))\n'
    )
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, '-c', program], check=True, cwd=root, stdout=subprocess.PIPE, text=True)
    status, output = json.loads(process.stdout)
    frames = re.split(r'[\r\n]+', re.sub(r'\x1b\[[A-Z]', '', output))
    assert status == 0
    assert any(frame.startswith('4/4 100%|') for frame in frames)
    assert max(map(len, frames)) <= 90
