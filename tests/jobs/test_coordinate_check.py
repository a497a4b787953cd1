import csv

from llm.configuration import Invocation
from llm.jobs.coordinate_check import CoordinateCheck, Variant
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig

LAYER = LayerConfig(AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8), FeedForwardConfig(d_ff=32))
MODEL = DecoderConfig(vocab_size=32, d_model=16, num_layers=1, pattern=(LAYER,))


def _job(directory):
    return CoordinateCheck(str(directory), (Variant('a <b>', MODEL, OptimizerConfig()),), StepConfig(2, 4), (16, 32), 1)


def _rows(path):
    with open(path, encoding='utf-8') as file:
        return list(csv.DictReader(file))


def test_the_job_writes_its_table_its_slopes_and_its_plot(tmp_path, capsys):
    _job(tmp_path / 'check')(Invocation(False, '', (), ()))
    rows = _rows(tmp_path / 'check' / 'coordinates.csv')
    assert [(row['width'], row['activation']) for row in rows] == [
        (width, name) for width in ('16', '32') for name in ('embedding', 'layer 1', 'logits', 'target logits')
    ]
    assert all(float(row['change']) > 0 for row in rows)
    slopes = {row['activation']: float(row['slope']) for row in _rows(tmp_path / 'check' / 'slopes.csv')}
    assert set(slopes) == {'embedding', 'layer 1', 'logits', 'target logits'}
    assert (tmp_path / 'check' / 'coordinates.svg').read_text(encoding='utf-8').startswith('<svg')
    assert capsys.readouterr().out.startswith('a <b>: embedding')


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    _job(tmp_path / 'check')(Invocation(True, '', (), ()))
    assert not (tmp_path / 'check').exists()
    assert 'widths (16, 32)' in capsys.readouterr().out
