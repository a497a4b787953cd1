"""The tutorial notebook runs from top to bottom, and what it shows is what it says."""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
from xml.etree import ElementTree

import nbclient
import nbformat
import numpy as np
import pytest

from llm.evaluation.reports import read_run
from llm.evaluation.reports.run_record import RunRecord

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / 'experiments' / 'notebooks' / 'quickstart.ipynb'
STEPS = 30
# Keeps what the test reads beside the outputs and the run directory.
KEEP = """
import json
np.save('attention.npy', attention)
Path('kept.json').write_text(json.dumps({'pieces': pieces, 'continuations': list(continuations.values())}))
"""


@dataclasses.dataclass(frozen=True)
class Executed:
    """The notebook after running: outputs by cell id, and what it left in its folder."""

    outputs: dict[str, list[nbformat.NotebookNode]]
    run: RunRecord
    attention: np.ndarray
    pieces: list[str]
    continuations: list[str]

    def printed(self, cell: str) -> str:
        return ''.join(o.text for o in self.outputs[cell] if o.output_type == 'stream' and o.name == 'stdout')

    def shown(self, cell: str) -> str:
        (page,) = (o.data['text/html'] for o in self.outputs[cell] if 'text/html' in o.get('data', {}))
        return page


@pytest.fixture(scope='module')
def executed(tmp_path_factory) -> Executed:
    folder = tmp_path_factory.mktemp('notebook')
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(KEEP))
    environment = {
        **os.environ,
        'PYTHONPATH': str(ROOT),
        'LLM_NOTEBOOK_STEPS': str(STEPS),
        'LLM_CACHE': str(folder / 'tokens'),
        'IPYTHONDIR': str(folder / 'ipython'),
        'XLA_FLAGS': '',  # one device and optimised programs, as a reader has
    }
    resources = {'metadata': {'path': str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=1800, kernel_name='python3', resources=resources)
    client.execute(env=environment)
    return Executed(
        {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == 'code'},
        read_run(folder / 'runs' / 'notebook'),
        np.load(folder / 'attention.npy'),
        **json.loads((folder / 'kept.json').read_text()),
    )


def test_is_committed_without_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == 'code']
    assert cells
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_points_to_what_exists():
    text = '\n'.join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    named = set(re.findall(r'(?<![\w/.-])((?:llm|gin_configs)/[\w/.-]*\w)', text))
    assert {'llm/jobs/pretrain.py', 'llm/models/attention.py', 'gin_configs/runs/quickstart.gin'} <= named
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.slow
def test_first_cell_does_nothing_where_the_package_is_installed(executed: Executed):
    assert executed.outputs['install'] == []


@pytest.mark.slow
def test_loss_falls_from_that_of_a_model_that_knows_nothing(executed: Executed):
    steps, losses = zip(*executed.run.series('loss'), strict=True)
    assert steps == tuple(range(1, STEPS + 1))
    assert losses[0] == pytest.approx(math.log(2048), abs=0.2)
    assert np.mean(losses[-5:]) < losses[0] - 1
    assert executed.printed('loss') == f'first step {losses[0]:.2f}, last step {losses[-1]:.2f}\n'
    assert 'data-name=&quot;loss&quot;' in executed.shown('loss')


@pytest.mark.slow
def test_score_stands_beside_the_compressor(executed: Executed):
    ((evaluation_set, scores),) = executed.run.evaluations.items()
    bits = scores[-1]['bits_per_byte']
    baselines = executed.run.baselines(evaluation_set)
    alone, primed = baselines['xz_alone_bits_per_byte'], baselines['xz_primed_bits_per_byte']
    assert 1 < primed < alone < bits < 3.4
    found = re.findall(r'^(.*?) +(\d\.\d{3})  █+$', executed.printed('score'), flags=re.MULTILINE)
    assert dict(found) == {
        f'this model after step {STEPS}': f'{bits:.3f}',
        'xz -9 alone': f'{alone:.3f}',
        'xz -9 primed with the training files': f'{primed:.3f}',
    }


@pytest.mark.slow
def test_samples_show_the_model_changing(executed: Executed):
    samples = [sample for sample in executed.run.samples if sample['prompt'] == 'def main(']
    assert [sample['step'] for sample in samples] == [6, 12, 18, 24, 30]
    texts = [sample['continuation'][:220] for sample in samples]
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert text
        assert f'def main({text}\n' in executed.printed('samples')


@pytest.mark.slow
def test_prompt_is_continued(executed: Executed):
    greedy, drawn = executed.continuations
    assert greedy != drawn
    for text in (greedy, drawn):
        assert text
        assert f'class Node:\n    def __init__(self, {text}\n' in executed.printed('generate')


@pytest.mark.slow
def test_attention_is_a_distribution_over_the_past(executed: Executed):
    attention, length = executed.attention, len(executed.pieces)
    assert attention.shape == (4, length, length)
    np.testing.assert_allclose(attention.sum(axis=-1), 1, atol=1e-5)
    assert not np.triu(attention, k=1).any()
    assert all(np.abs(head - other).max() > 0.01 for head, other in itertools.combinations(attention, 2))
    assert executed.printed('check').startswith('rows sum to one; nothing looks ahead;')


@pytest.mark.slow
def test_maps_draw_every_weight(executed: Executed):
    maps = ElementTree.fromstring(f'<maps>{executed.shown("maps")}</maps>')
    for head, drawn in zip(executed.attention, maps, strict=True):
        opacities = [float(square.get('fill-opacity')) for square in drawn.iter('rect')]
        lower = head[np.tril_indices(len(head))]
        np.testing.assert_allclose(opacities, 0.04 + 0.96 * lower, atol=1e-3)
        assert [text.text for text in drawn.iter('text')][1:] == executed.pieces
