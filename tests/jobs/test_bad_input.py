"""Mistakes of a person's, end to end: one line that says what is wrong, exit code 2, nothing that was there is lost."""

import contextlib
import gzip
import json
import os
import re
import resource
import shutil
import tempfile

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llm.configuration import Invocation, load_job
from llm.data.vocabularies import ByteVocabulary, SpecialTokens
from llm.errors import TRY_AGAIN, UserError
from llm.main import main
from llm.training.metrics import read_metrics

NOBODY = 65534
# The squared logits make the gradient grow with them, from step 4 on by many orders of magnitude a step.
EXPLODING = (
    *('LEARNING_RATE = 1.0', 'CLIP_NORM = None'),
    *("optimizers.OptimizerConfig.kind = 'sgd'", 'step.StepConfig.z_loss = 1.0'),
)


@pytest.fixture
def refused(tiny_run, capfd):
    """Runs the tiny run with bindings that it must refuse; what it says is wrong."""

    def refused(*bindings):
        capfd.readouterr()
        code = tiny_run(*bindings)
        printed = capfd.readouterr().err
        *before, last = printed.splitlines()
        assert (code, last[:7], [line for line in before if 'error' in line.lower()]) == (2, 'error: ', []), printed
        assert 'Traceback' not in printed
        return last.removeprefix('error: ')

    return refused


@contextlib.contextmanager
def largest_file(size):
    """Within this context no file can grow beyond `size` bytes: writes fail, by the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def as_nobody():
    """Within this context root's privilege to write everywhere is laid down, if there is any."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)


@pytest.mark.parametrize(
    ('bindings', 'said'),
    [
        (("TOTAL_STEPS = 'many'",), ['TOTAL_STEPS', 'many']),
        (('TOTAL_STEP = 12',), ['TOTAL_STEP', 'Did you mean TOTAL_STEPS?']),
        (('pretrain.Pretrain.sampels = None',), ['sampels', 'Did you mean', 'samples']),
        (('attention.AttentionConfig.dropuot = 0.1',), ['dropuot']),
        (('mesh.MeshConfig.data = 8',), ['4 rows', 'cannot be divided over 8 devices', 'multiple of 8']),
        (('mesh.MeshConfig.data = 16',), ['data=16 needs 16 devices but 8 exist']),
        (('mesh.MeshConfig.tensor = 4',), ["heads' of size 2 cannot be divided over mesh axis 'tensor' of size 4"]),
        (
            ("decoder.DecoderConfig.position = 'learned'", 'decoder.DecoderConfig.max_positions = 16'),
            ['sequences of 32 tokens are longer than the 16 learned positions'],
        ),
        (('WARMUP_STEPS = 100',), ['warm-up of 100 steps is longer than the run of 12']),
        (('GRADIENT_ACCUMULATION = 3',), ['a batch of 4 rows cannot be cut into 3 microbatches']),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else '',
)
def test_a_config_that_cannot_run_is_refused_before_anything_is_written(tiny_run, refused, bindings, said):
    line = refused(*bindings)
    assert all(part in line for part in said), line
    assert not tiny_run.directory.exists()


def test_a_missing_include(tiny_run, refused):
    path = tiny_run.folder / 'run.gin'
    path.write_text(path.read_text().replace('models/tiny.gin', 'models/tiney.gin'))
    assert "the gin file 'gin_configs/models/tiney.gin' does not exist" in (line := refused())
    assert f'{path}:3: ' in line and 'Did you mean gin_configs/models/tiny.gin?' in line
    assert not tiny_run.directory.exists()


def test_a_corrected_mistake_goes_on_in_the_same_directory(tiny_run, refused):
    missing = str(tiny_run.folder / 'nothing*.txt')
    assert f'no file matches {missing!r}' in refused(f'FILES = {missing!r}')
    assert 'the vocabulary has 259 tokens and the model 200' in refused('VOCAB_SIZE = 200')
    assert tiny_run() == 0
    assert f'holds a run of another config: data.components.0.source.files {str(tiny_run.corpus)!r} there' in refused(
        f'FILES = {missing!r}'
    )
    assert tiny_run.steps() == [6, 9, 12]


def damaged_files(folder, content):
    """(name, content, what is said of it) of files whose data is cut short or changed."""
    packed = gzip.compress(content)
    yield 'cut.jsonl.gz', packed[: len(packed) // 2], 'compressed data ends early'
    yield 'changed.jsonl.gz', packed[:200] + bytes([packed[200] ^ 255]) + packed[201:], 'compressed data is corrupt'
    packed = zstandard.ZstdCompressor().compress(content)
    yield 'cut.jsonl.zst', packed[: len(packed) // 2], 'compressed data ends early'
    yield 'text.jsonl.zst', content, 'compressed data is corrupt'
    pyarrow.parquet.write_table(pyarrow.table({'text': content.decode().split('\n')}), folder / 'whole.parquet')
    packed = (folder / 'whole.parquet').read_bytes()
    (folder / 'whole.parquet').unlink()
    yield 'cut.parquet', packed[: len(packed) // 2], 'parquet data is corrupt or cut short'


def test_corrupt_files_are_named_and_what_was_there_stays(tiny_run, refused):
    for name, content, said in damaged_files(tiny_run.folder, tiny_run.corpus.read_bytes()):
        path = tiny_run.folder / name
        path.write_bytes(content)
        directory = f'RUN_DIRECTORY = {str(tiny_run.folder / name) + ".run"!r}'
        line = refused(f'FILES = {str(path)!r}', directory)
        assert str(path) in line and said in line
        assert path.read_bytes() == content


def test_a_mended_file_goes_on_in_the_same_directory(tiny_run, refused):
    whole = tiny_run.corpus.read_bytes()
    tiny_run.corpus.unlink()
    path = tiny_run.folder / 'corpus.jsonl.gz'
    files = f'FILES = {str(path)!r}'
    path.write_bytes(gzip.compress(whole)[:-30])
    assert 'compressed data ends early' in refused(files)
    path.write_bytes(gzip.compress(whole))
    assert tiny_run(files) == 0
    assert len(tiny_run.metrics('train')) == 12


def test_json_without_the_text_field(tiny_run, refused):
    content = ''.join(json.dumps({'txet': f'document {i}'}) + '\n' for i in range(150))
    tiny_run.corpus.write_text(content)
    line = refused()
    assert f"{tiny_run.corpus}:101: no field 'text' (text_field); it has 'txet'; 101 bad records, more than" in line


def test_bad_records_are_counted_and_left_out(tiny_run, refused):
    good = tiny_run.corpus.read_bytes()
    bad = (
        b'{"text": "caf\xe9 au lait, s\'il vous pla\xeet"}\n' * 3
        + b'{"text": "  "}\n' * 2
        + b'{"title": "x"}\nnot JSON\n'
    )
    tiny_run.corpus.write_bytes(good + bad)
    assert tiny_run() == 0
    summary = json.loads((tiny_run.directory / 'summary.json').read_text())
    # Both splits read every record; one document belongs to one split, what is bad belongs to none.
    assert summary['bad_records'] == {'empty': 4, 'invalid UTF-8': 6, 'left out': 4}
    caches = [json.loads(path.read_text()) for path in tiny_run.folder.glob('tokens/*/manifest.json')]
    assert sum(shard['num_documents'] for cache in caches for shard in cache['shards']) == 43
    first = summary['bad_examples'][0]
    assert first == {'where': f'{tiny_run.corpus}:41', 'reason': 'invalid UTF-8, replaced by U+FFFD'}
    report = (tiny_run.directory / 'report.html').read_text()
    assert 'invalid UTF-8' in report and f'{tiny_run.corpus}:41' in report

    stop = ("text_files.TextFiles.invalid_utf8 = 'stop'", f"RUN_DIRECTORY = '{tiny_run.folder}/stop'")
    assert f'{tiny_run.corpus}:41: invalid UTF-8' in refused(*stop)
    limit = ('text_files.TextFiles.max_bad_records = 1', f"RUN_DIRECTORY = '{tiny_run.folder}/limit'")
    assert '2 bad records, more than max_bad_records = 1' in refused(*limit)


def test_empty_files_and_documents_of_one_enormous_line(tiny_run):
    folder = tiny_run.folder / 'texts'
    folder.mkdir()
    (folder / 'empty.txt').write_bytes(b'')
    (folder / 'empty.jsonl').write_bytes(b'')
    (folder / 'line.txt').write_text(' '.join(map(str, range(2_750_000))))
    (folder / 'word.jsonl').write_bytes(b'{"text": "' + b'w' * 20_000_000 + b'"}')
    assert tiny_run(f"FILES = '{folder}/*'", 'datasets.DataConfig.evaluation_documents = 3') == 0
    summary = json.loads((tiny_run.directory / 'summary.json').read_text())
    assert summary['bad_records'] == {'empty': 2}
    # The one word is a document for training; of the line, cut into pieces, a fifth is held out.
    line = (folder / 'line.txt').stat().st_size
    assert line > 20_000_000
    assert abs(summary['facts']['text: bytes'] - 20_000_000 - 0.8 * line) < 0.01 * line


@pytest.fixture
def half_run(tiny_run):
    """A tiny run as a kill after step 9 leaves it."""
    assert tiny_run() == 0
    (tiny_run.directory / 'complete').unlink()
    shutil.rmtree(tiny_run.checkpoints / 'step_000000012')
    return tiny_run


def test_another_vocabulary_than_that_of_the_checkpoint(half_run, refused):
    ours = half_run.directory / 'vocabulary'
    whole = read_metrics(half_run.directory)
    ours.rename(half_run.folder / 'kept')
    other = ByteVocabulary(SpecialTokens(pad='<padding>'))
    other.save(ours)
    line = refused()
    assert f'{half_run.checkpoints}/step_000000009: the vocabulary is not what this checkpoint was trained with' in line
    assert half_run.steps() == [6, 9]
    assert read_metrics(half_run.directory) == whole
    shutil.rmtree(ours)
    (half_run.folder / 'kept').rename(ours)
    assert half_run() == 0
    assert len(half_run.metrics('train')) == 12

    line = refused(
        f"RUN_DIRECTORY = '{half_run.folder}/next'",
        f"INITIAL_PARAMETERS = '{half_run.directory}'",
        'training.VocabularyConfig.special_tokens = @special_tokens.SpecialTokens()',
        "special_tokens.SpecialTokens.pad = '<padding>'",
    )
    assert 'the vocabulary is not the one that these parameters were trained with' in line


def test_other_data_than_that_of_the_checkpoint(half_run, refused):
    content = half_run.corpus.read_text()
    half_run.corpus.write_text(content + json.dumps({'text': 'one more'}) + '\n')
    assert 'the data is not what this checkpoint was trained with' in refused()
    assert half_run.steps() == [6, 9]
    half_run.corpus.write_text(content)
    assert half_run() == 0


def test_a_best_metric_that_nothing_is_called(refused):
    settings = ('checkpoints.CheckpointConfig.keep_best = 1', "checkpoints.CheckpointConfig.best_metric = 'loss'")
    assert "nothing is called 'loss'. Use one of ['text/loss', " in refused(*settings)


def test_a_loss_that_is_not_finite(tiny_run, refused):
    line = refused(*EXPLODING)
    assert re.match(
        rf'{re.escape(str(tiny_run.directory))}: the loss is [\d.]+ and the gradient norm nan at step 5 '
        r'\(batch 4: examples 16 to 19 of the data order\); the checkpoint of step 3 is kept\. ',
        line,
    )
    assert tiny_run.steps() == [3]
    assert [step['step'] for step in tiny_run.metrics('train')] == [1, 2, 3, 4]
    # As exact as everything: from the checkpoint it ends in the same way.
    assert refused(*EXPLODING) == line
    assert 'another config: optimizer.learning_rate 1.0 there, 0.001 here' in refused(
        *EXPLODING, 'LEARNING_RATE = 1e-3'
    )
    advice = (f"RUN_DIRECTORY = '{tiny_run.folder}/next'", f"INITIAL_PARAMETERS = '{tiny_run.directory}'")
    assert tiny_run(*advice) == 0


def test_parameters_that_evaluation_finds_bad_are_not_saved(tiny_run, refused):
    # Step 2 has a finite loss and gradient still, but what its update makes has not.
    line = refused(*EXPLODING, 'LEARNING_RATE = 1e4', 'EVALUATE_EVERY = 2', 'SAVE_EVERY = 1')
    assert 'the loss on text is nan at step 2 ' in line and 'the checkpoint of step 1 is kept' in line
    assert tiny_run.steps() == [1]
    assert tiny_run.metrics('evaluation') == []


def test_a_full_disk(tiny_run, refused):
    with largest_file(4_000):
        assert 'config.json: cannot write: File too large. Check permissions and free space.' in refused()
    with largest_file(12_000):
        line = refused()
    assert f'{tiny_run.folder}/tokens/' in line and 'the token cache cannot be written (File too large)' in line
    with largest_file(60_000):
        line = refused()
    assert f'{tiny_run.checkpoints}/step_000000003' in line
    assert 'the checkpoint of step 3 was not saved: the disk is full' in line
    assert tiny_run.steps() == []
    assert tiny_run() == 0
    assert tiny_run.steps() == [6, 9, 12]


def test_a_full_disk_may_be_passed_over(tiny_run, capfd):
    go_on = "checkpoints.CheckpointConfig.on_full_disk = 'continue'"
    with largest_file(60_000):
        assert tiny_run(go_on) == TRY_AGAIN
    captured = capfd.readouterr()
    assert captured.err.count('was not saved: the disk is full') == 4
    assert 'stopped, run the same command to go on' in captured.out
    assert tiny_run.steps() == []
    without = read_metrics(tiny_run.directory)
    assert tiny_run(go_on) == 0
    assert ': complete' in capfd.readouterr().out
    assert tiny_run.steps() == [6, 9, 12]

    def results(records):
        return [{name: value for name, value in record.items() if name != 'timing'} for record in records]

    assert results(read_metrics(tiny_run.directory)) == results(without)


@pytest.mark.parametrize('place', ['run', 'tokens'])
def test_no_permission(tiny_run, place):
    for folder in (tiny_run.folder, *tiny_run.folder.parents):
        if folder.stat().st_uid == os.geteuid() and folder.is_relative_to(tempfile.gettempdir()):
            folder.chmod(folder.stat().st_mode | 0o055)
    for name in ('run', 'tokens'):
        (tiny_run.folder / name).mkdir()
        (tiny_run.folder / name).chmod(0o555 if name == place else 0o777)
    # Read with the rights of the one who runs the tests, whose repository nobody else may be allowed to read.
    job, text = load_job([str(tiny_run.folder / 'run.gin')])
    with as_nobody(), pytest.raises(UserError, match='Permission denied') as caught:
        job(Invocation(dry_run=False, operative_config=text, command=(), config_files=()))
    assert str(tiny_run.folder / place) in str(caught.value)
    assert main(tiny_run.arguments) == (2 if os.geteuid() else 0)
