import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.evaluation.reports import update_summary, write_report
from llm.evaluation.reports.run_record import read_run
from llm.training.metrics import JsonLines, MetricsWriter


class Page(HTMLParser):
    """Elements, attributes and text of a page; every element must be closed where it was opened."""

    VOID = frozenset({'meta', 'path', 'polyline', 'polygon'})

    def __init__(self, path: Path):
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ''
        self._open: list[str] = []
        self.source = path.read_text(encoding='utf-8')
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] not in (['style'], ['script']):
            self.text += data


def train(directory: Path, first: int, last: int, total: int) -> None:
    with MetricsWriter(directory, first) as writer:
        for step in range(first + 1, last + 1):
            values = {'loss': 2 + 3 / step, 'gradient_norm': 1.0, 'learning_rate': 1e-3, 'tokens': 4096.0}
            writer.write(step, 'train', values, timing={'tokens_per_second': 8000.0, 'mfu': 0.4, 'mfu_causal': 0.35})
            if step % 10 == 0:
                scores = {'loss': 2 + 3 / step, 'perplexity': math.exp(2 + 3 / step), 'bits_per_byte': 1.5 + 1 / step}
                writer.write(step, 'evaluation', {'set': 'held_out', **scores})
    update_summary(directory, {'total_steps': total})


def complete_run(directory: Path, text: str = 'text') -> Path:
    """A run of 40 steps, killed once; every text in it is `text`."""
    train(directory, 0, 25, 40)
    train(directory, 20, 40, 40)
    samples = JsonLines(directory / 'samples.jsonl', 0)
    for step in (20, 40):
        samples.append({'step': step, 'prompt': text, 'continuation': text})
    with MetricsWriter(directory, 40) as writer:
        writer.write(40, 'warning', {'message': text})
        writer.write(40, 'evaluation', {'set': text, 'loss': 1.0})
    update_summary(
        directory,
        {
            'facts': {'Parameters': 4_213_248, 'Corpus': 'a long description of the corpus', text: text},
            'baselines': {'held_out': {'xz_alone_bits_per_byte': 1.6, 'xz_primed_bits_per_byte': 1.4, text: 1.0}},
            'bad_records': {text: 1234},
            'bad_examples': [{'where': text, 'reason': text, 'record': text}],
            'warnings': [text],
        },
    )
    (directory / 'config.gin').write_text(text, encoding='utf-8', errors='replace')
    (directory / 'environment.json').write_text(json.dumps({'devices': {'kind': text}, text: [text, 1], 'empty': {}}))
    return directory


def test_complete_run_shows_its_figures(tmp_path):
    page = Page(write_report(complete_run(tmp_path / 'my_run')))
    assert page.text.startswith('\nmy_run')
    for words in (
        'complete, 40 steps',
        '1.5250 bits per byte',
        'step 40, loss 2.0750 nats per token, perplexity 7.96',
        'xz -9 alone1.600 4.9% more',
        'xz -9 primed with the training text1.400 8.2% less',
        'Tokens trained on164k4.10k a step',
        'resumed 1 time',
        'Tokens per second8.00kmedian step',
        'Model FLOPs utilization40.0%median step; 35.0% with causal attention only',
        'Parameters4.21M',
        'a long description of the corpus',
        '2 warnings',
        'Samples at step 40',
        '1,234',
        'devices.kind',
    ):
        assert words in page.text
    assert re.findall(r'data-name="([^"]*)"', page.source).count('held_out') == 2
    assert page.tags['figure'] == 6
    assert page.source.count('class="level"') == 3


def test_what_some_objectives_measure_is_drawn(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            further = {'loss_2_ahead': 5.0 / step, 'loss_3_ahead': 6.0 / step, 'next_sentence_accuracy': 0.5}
            writer.write(step, 'train', {'loss': 4.0 / step, **further})
    source = write_report(tmp_path).read_text()
    assert 'Loss by token ahead, nats per token' in source and 'Pairs of texts told apart, %' in source
    assert all(f'data-name="{name}"' in source for name in ('next token', '2 ahead', '3 ahead'))


def test_nothing_outside_the_file_is_needed(tmp_path):
    page = Page(write_report(complete_run(tmp_path)))
    names = {name for name, _ in page.attributes}
    assert names.isdisjoint({'src', 'href', 'srcset', 'action', 'data', 'poster'})
    assert page.tags.keys().isdisjoint({'link', 'img', 'iframe', 'object', 'embed', 'base', 'form'})
    assert not re.search(r'https?:|@import|url\(|fetch\(|import\(', page.source)


HOSTILE = (
    '</pre></script></style><script>alert(1)</script><img src=x onerror=alert(1)>"\' &amp; \x00\x1b[31m\udcff\u202e'
)


@settings(max_examples=25)
@given(text=st.one_of(st.just(HOSTILE), st.text(st.characters(codec=None), min_size=1, max_size=30)))
def test_no_text_changes_the_page(tmp_path_factory, text):
    harmless = Page(write_report(complete_run(tmp_path_factory.mktemp('a'), 'a text that is of no harm')))
    page = Page(write_report(complete_run(tmp_path_factory.mktemp('b'), text)))
    assert page.tags['script'] == page.tags['style'] == 1
    assert page.tags['img'] == 0
    assert {name for name, _ in page.attributes} <= {name for name, _ in harmless.attributes}
    assert page.tags['pre'] == harmless.tags['pre']


def test_prompt_and_continuation_are_told_apart(tmp_path):
    samples = JsonLines(tmp_path / 'samples.jsonl', 0)
    samples.append({'step': 7, 'prompt': 'if x < y:\n', 'continuation': '    return x & y\n'})
    page = Page(write_report(tmp_path))
    assert '<span class="prompt">if x &lt; y:\n</span>    return x &amp; y\n' in page.source


def test_empty_directory(tmp_path):
    page = Page(write_report(tmp_path))
    assert 'No step has been logged yet.' in page.text
    assert page.tags['figure'] == 0


def test_run_without_evaluation(tmp_path):
    train(tmp_path, 0, 3, total=1000)
    update_summary(tmp_path, {'baselines': {'held_out': {'xz_alone_bits_per_byte': 1.6}}})
    page = Page(write_report(tmp_path))
    assert 'step 3 of 1,000' in page.text
    assert 'xz -9 alone1.600' in page.text
    assert 'this model' not in page.text
    assert page.tags['figure'] == 5


def test_run_that_diverged(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, 'train', {'loss': np.float32('nan'), 'tokens': 5})
        writer.write(1, 'evaluation', {'set': 'held_out', 'loss': math.inf, 'bits_per_byte': math.nan})
    page = Page(write_report(tmp_path))
    assert 'no finite score' in page.text


@pytest.mark.parametrize('name', ['metrics.jsonl', 'samples.jsonl', 'summary.json', 'environment.json', 'config.gin'])
@pytest.mark.parametrize('damage', ['missing', 'empty', 'half', 'noise', 'other'])
def test_damaged_files_leave_a_page_of_the_rest(tmp_path, name, damage):
    directory = complete_run(tmp_path)
    path = directory / name
    content = path.read_bytes()
    if damage == 'missing':
        path.unlink()
    else:
        path.write_bytes(
            {'empty': b'', 'half': content[: len(content) // 2], 'noise': b'\xff\x00\n{' * 9, 'other': b'[1]\n'}[damage]
        )
    page = Page(write_report(directory))
    if name != 'metrics.jsonl':
        assert '1.5250 bits per byte' in page.text
    if name.endswith('.json') and damage != 'missing':
        assert f'{name} ' in page.text  # said among the warnings


@pytest.mark.parametrize('value', [None, 3, 'text', [], [1], {'held_out': 3}, {'held_out': {'a': 'b'}}])
def test_summary_of_another_shape(tmp_path, value):
    directory = complete_run(tmp_path)
    keys = ('total_steps', 'facts', 'baselines', 'bad_records', 'bad_examples', 'warnings')
    update_summary(directory, dict.fromkeys(keys, value))
    assert '1.5250 bits per byte' in Page(write_report(directory)).text


def test_summary_keeps_what_is_not_set(tmp_path):
    update_summary(tmp_path, {'total_steps': 5, 'facts': {'a': 1}})
    update_summary(tmp_path, {'facts': {'b': 2}})
    assert read_run(tmp_path).summary == {'total_steps': 5, 'facts': {'b': 2}}


def test_time_and_restarts_come_from_the_processes(tmp_path):
    lines = JsonLines(tmp_path / 'metrics.jsonl', 0)
    for step, started, elapsed in ((1, 100.0, 4.0), (2, 100.0, 5.0), (3, 200.0, 60.0), (4, 200.0, 61.5)):
        lines.append({'step': step, 'kind': 'train', 'tokens': 10, 'timing': {'started': started, 'elapsed': elapsed}})
    run = read_run(tmp_path)
    assert run.seconds == 66.5
    assert run.resumed_at == [2]
    assert run.tokens_per_step == 10
