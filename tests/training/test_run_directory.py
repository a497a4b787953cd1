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


def test_a_damaged_record_is_named(tmp_path):
    claim(tmp_path / 'run', Whole(), '', changeable=())
    (tmp_path / 'run' / 'config.json').write_text('{')
    with pytest.raises(UserError, match=r'config\.json: cannot be read as JSON'):
        claim(tmp_path / 'run', Whole(), '', changeable=())


def test_an_unwritable_place_is_one_clear_line(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'file/run/config\.gin: cannot write'):
        write_atomically(tmp_path / 'file' / 'run' / 'config.gin', 'x')
