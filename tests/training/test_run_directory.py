import dataclasses
import json

import pytest

from llm.errors import UserError
from llm.training.run_directory import claim, flatten_config, write_atomically


@dataclasses.dataclass(frozen=True)
class Part:
    size: int = 3
    names: tuple[str, ...] = ('a', 'b')


@dataclasses.dataclass(frozen=True)
class Whole:
    part: Part = Part()
    pattern: tuple[Part, ...] = (Part(1), Part(2))
    mesh: Part = Part(8)
    rate: float = 0.5


def test_flattening_names_every_field_and_type():
    flat = flatten_config(Whole())
    assert flat['part.size'] == 3 and flat['part.names'] == ['a', 'b'] and flat['rate'] == 0.5
    assert flat['pattern.0.size'] == 1 and flat['pattern.1.size'] == 2
    assert flat['type'] == 'Whole' and flat['pattern.1.type'] == 'Part'


def test_a_directory_is_claimed_once_and_recognised_again(tmp_path):
    directory = tmp_path / 'run'
    assert claim(directory, Whole(), 'text of gin', changeable=('mesh',)) is False
    assert (directory / 'config.gin').read_text() == 'text of gin'
    assert claim(directory, Whole(), 'other text', changeable=('mesh',)) is True
    assert (directory / 'config.gin').read_text() == 'text of gin'


def test_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    claim(tmp_path / 'run', Whole(), '', changeable=('mesh',))
    (tmp_path / 'run' / 'metrics.jsonl').write_text('')
    other = Whole(part=Part(4), pattern=(Part(1),))
    with pytest.raises(UserError, match=r'run: holds a run of another config: part\.size 3 there, 4 here, pattern\.1'):
        claim(tmp_path / 'run', other, '', changeable=('mesh',))


def test_changeable_fields_may_differ(tmp_path):
    claim(tmp_path / 'run', Whole(), '', changeable=('mesh',))
    assert claim(tmp_path / 'run', Whole(mesh=Part(1)), '', changeable=('mesh',)) is True
    assert 'mesh.size' not in json.loads((tmp_path / 'run' / 'config.json').read_text())


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / 'thesis.tex').write_text('precious')
    with pytest.raises(UserError, match='not a run directory'):
        claim(tmp_path, Whole(), '', changeable=())
    assert (tmp_path / 'thesis.tex').read_text() == 'precious'
    claim(tmp_path / 'run', Whole(), '', changeable=())
    with pytest.raises(UserError, match='run: is of Whole, not of Part'):
        claim(tmp_path / 'run', Part(1), '', changeable=())


def test_a_run_that_has_computed_nothing_gives_way(tmp_path):
    claim(tmp_path / 'run', Whole(), 'old', changeable=())
    (tmp_path / 'run' / 'checkpoints').mkdir()
    assert claim(tmp_path / 'run', Whole(rate=1.0), 'new', changeable=()) is False
    assert (tmp_path / 'run' / 'config.gin').read_text() == 'new'
    assert claim(tmp_path / 'run', Whole(rate=1.0), 'new', changeable=()) is True
    (tmp_path / 'run' / 'checkpoints' / 'step_000000001').mkdir()
    with pytest.raises(UserError, match='another config: rate 1.0 there, 0.5 here'):
        claim(tmp_path / 'run', Whole(), 'old', changeable=())


@pytest.mark.parametrize('left', [('config.json.partial',), ('config.json',), ('config.json', 'config.gin.partial')])
def test_killed_while_claiming_it_is_claimed_by_the_next(tmp_path, left):
    for config in (Whole(), Whole(rate=1.0)):
        directory = tmp_path / str(config.rate)
        claim(directory, Whole(), 'text', changeable=())
        record = (directory / 'config.json').read_text()
        for path in directory.iterdir():
            path.unlink()
        for name in left:
            (directory / name).write_text(record if name == 'config.json' else record[:9])
        claim(directory, config, 'text', changeable=())
        assert claim(directory, config, 'text', changeable=()) is True
        assert (directory / 'config.gin').read_text() == 'text'


@pytest.mark.parametrize('name', ['config.gin', 'config.json'])
def test_a_file_that_only_has_our_name_is_not_replaced(tmp_path, name):
    (tmp_path / name).write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match='not a run directory|not the record of a run'):
        claim(tmp_path, Whole(), 'text', changeable=())
    assert (tmp_path / name).read_text() == '{"model_type": "llama"}'


def test_a_damaged_record_is_named(tmp_path):
    claim(tmp_path / 'run', Whole(), '', changeable=())
    for damage, said in (('{', 'cannot be read as JSON'), ('[]', 'is not the record of a run')):
        (tmp_path / 'run' / 'config.json').write_text(damage)
        with pytest.raises(UserError, match=rf'config\.json: {said}'):
            claim(tmp_path / 'run', Whole(), '', changeable=())


def test_an_unwritable_place_is_one_clear_line(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'file/run/config\.gin: cannot write'):
        write_atomically(tmp_path / 'file' / 'run' / 'config.gin', 'x')
