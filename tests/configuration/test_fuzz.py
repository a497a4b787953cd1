"""Random configs and random damage: what loads is right, to the type; what does not gives one line, never a crash."""

import collections.abc
import dataclasses
import math
import pathlib
import types
import typing

import gin
import hypothesis
import pytest
from gin_samples.jobs import Train
from gin_samples.models import Decoder, Layer, Norm, relu
from gin_samples.other.models import Teacher
from hypothesis import strategies as st

from llm.configuration import load_job
from llm.errors import UserError

# Files are written in a folder shared by all examples.
settings = hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
    max_examples=40,
)

floats = st.floats(allow_nan=False)
norms = st.builds(Norm, kind=st.sampled_from(['rms', 'layer']), epsilon=floats)
layers = st.builds(Layer, window=st.none() | st.integers(1), norm=norms, bias=st.booleans())
decoders = st.builds(
    Decoder,
    num_layers=st.integers(),
    pattern=st.lists(layers, max_size=3).map(tuple),
    dropout=floats,
    name=st.text(),
    shape=st.tuples(st.integers(), floats, st.text()),
    norm=st.none() | norms,
)
jobs = st.builds(
    Train,
    model=decoders,
    steps=st.integers(),
    files=st.text() | st.lists(st.text(), max_size=3).map(tuple),
    rates=st.dictionaries(st.text(), floats, max_size=3),
    number=floats | st.integers(),
    draft=st.none() | decoders,
    teacher=st.builds(Teacher, temperature=floats),
    layers=st.lists(layers, max_size=2),
    activation=st.just(relu),
    failure=st.sampled_from(['none', 'user', 'bug', 'interrupt']),
)

MODULES = {Train: 'jobs', Decoder: 'models', Layer: 'models', Norm: 'models', Teacher: 'others', relu: 'models'}


class Writer:
    """Writes a job as gin in one of the many ways a person might: scopes, macros, omitted defaults, any order."""

    def __init__(self, draw):
        self.draw = draw
        self.lines = []
        self.count = 0

    def text(self, job):
        self.lines.append(f'JOB = {self.value(job)}')
        imports = [
            'from __gin__ import dynamic_registration',
            'from gin_samples import jobs',
            'import gin_samples.models as models',
            'from gin_samples.other import models as others',
        ]
        return '\n'.join((*imports, *self.draw(st.permutations(self.lines))))

    def value(self, value):
        written = self.written(value)
        if self.draw(st.integers(0, 4)) == 0:
            self.count += 1
            self.lines.append(f'M{self.count} = {written}')
            written = f'%M{self.count}'
        return written

    def written(self, value):
        if dataclasses.is_dataclass(value):
            return self.reference(value)
        if isinstance(value, tuple):
            return f'({"".join(self.value(item) + ", " for item in value)})'
        if isinstance(value, list):
            return f'[{", ".join(map(self.value, value))}]'
        if isinstance(value, dict):
            return f'{{{", ".join(f"{key!r}: {self.value(item)}" for key, item in value.items())}}}'
        if isinstance(value, float) and math.isinf(value):
            return '-1e400' if value < 0 else '1e400'
        return f'@{MODULES[value]}.relu' if value is relu else repr(value)

    def reference(self, instance):
        self.count += 1
        cls = type(instance)
        name = f'scope{self.count}/{MODULES[cls]}.{cls.__name__}'
        for field in dataclasses.fields(cls):
            value = getattr(instance, field.name)
            if (type(value), value) != (type(field.default), field.default) or self.draw(st.booleans()):
                self.lines.append(f'{name}.{field.name} = {self.value(value)}')
        return f'@{name}()'


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp('fuzz')
        patch.chdir(folder)
        yield folder / 'run.gin'


@settings
@hypothesis.given(jobs, st.data())
def test_random_configs_load_and_round_trip(path, job, data):
    text = Writer(data.draw).text(job)
    path.write_text(text)
    got, operative = load_job([str(path)])
    assert repr(got) == repr(job)  # == takes 1 for 1.0
    assert is_typed(got, Train)
    path.write_text(operative)
    again, same = load_job([str(path)])
    assert repr(again) == repr(job)
    assert same == operative
    gin.clear_config()
    gin.parse_config(text)
    oracle = gin.get_configurable('JOB/gin.macro')()
    assert repr(dataclasses.replace(oracle, activation=relu)) == repr(job)  # gin wraps functions


def is_typed(value, annotation):
    """Whether `value`, and every field inside it, is exactly of the type that the annotation names."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(is_typed(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return type(value) is str and value in arguments
    if origin is dict:
        return type(value) is dict and all(
            is_typed(k, arguments[0]) and is_typed(v, arguments[1]) for k, v in value.items()
        )
    if origin in (tuple, list):
        each = arguments if origin is tuple and Ellipsis not in arguments else arguments[:1] * len(value)
        return type(value) is origin and len(value) == len(each) and all(map(is_typed, value, each))
    if origin is collections.abc.Callable:
        return callable(value)
    hints = typing.get_type_hints(annotation) if dataclasses.is_dataclass(annotation) else {}
    return type(value) is annotation and all(is_typed(getattr(value, name), hint) for name, hint in hints.items())


VALID = """
# A run, every construct of the language in it.
from __gin__ import dynamic_registration
from gin_samples import jobs
from gin_samples import models as m
import gin_samples.other.models
include 'piece.gin'

STEPS = 100        # a knob
NAME = 'a' 'b'
JOB = @jobs.Train()
jobs.Train.steps = %STEPS
jobs.Train.model = @main/m.Decoder()
jobs.Train.draft = %DRAFT
jobs.Train.files = ["x", "y"]
jobs.Train.rates = {'books': 0.5, 'web': 2}
jobs.Train.layers = [@m.Layer(), @local/m.Layer()]
jobs.Train.activation = @m.relu
jobs.Train.teacher = @gin_samples.other.models.Teacher()
gin_samples.other.models.Teacher.temperature = 1e-3
m.Decoder.name = %NAME
main/m.Decoder:
  num_layers = 2
  shape = (1, 2,
           'three')
main/m.Decoder.norm = @m.Norm()
m.Norm.kind = 'layer'
local/m.Layer.window = 7
local/m.Layer.bias = True
"""
PIECE = """
from __gin__ import dynamic_registration
from gin_samples import models
LAYERS = 3
DRAFT = @models.Decoder()
DRAFT/models.Decoder.num_layers = %LAYERS
"""
LITERALS = ["'x'", '1', '-1', '1.5', '0', 'True', 'None', '()', '(1,)', '[]', '{}', '1e999', '1j', "b'x'", '...']
LITERALS += ['[[1]]', '{%STEPS: 1}', '%STEPS', '%LAYERS', '%DRAFT', '%gin.REQUIRED', 'x']
LITERALS += ['@m.relu', '@m.Norm()', '@local/m.Layer()']


@st.composite
def damaged(draw, text):
    """`text` with one to three mistakes in it."""
    for _ in range(draw(st.integers(1, 3))):
        lines = text.split('\n')
        line = draw(st.integers(0, len(lines) - 1))
        place = draw(st.integers(0, len(text)))
        match draw(st.sampled_from(['delete', 'replace', 'insert', 'word', 'literal', 'duplicate', 'drop', 'swap'])):
            case 'delete':
                text = text[:place] + text[place + draw(st.integers(1, 4)) :]
            case 'replace':
                text = text[:place] + draw(st.characters(exclude_categories=['Cs'])) + text[place + 1 :]
            case 'insert':
                text = text[:place] + draw(st.sampled_from('=()[]{}@%/.,:\'"\\#\n\t 0a_-')) + text[place:]
            case 'word':  # a name in place of another
                words = text.split(' ')
                one, other = (draw(st.integers(0, len(words) - 1)) for _ in range(2))
                words[one] = words[other]
                text = ' '.join(words)
            case 'literal':
                name, equals, _ = lines[line].partition(' = ')
                lines[line] = name + equals + (draw(st.sampled_from(LITERALS)) if equals else '')
                text = '\n'.join(lines)
            case 'duplicate':
                text = '\n'.join([*lines[:line], lines[line], *lines[line:]])
            case 'drop':
                text = '\n'.join(lines[:line] + lines[line + 1 :])
            case 'swap':
                other = draw(st.integers(0, len(lines) - 1))
                lines[line], lines[other] = lines[other], lines[line]
                text = '\n'.join(lines)
    return text


def load_or_one_line(path, *bindings):
    """Loads a file; a mistake must be a UserError of one line that says something."""
    try:
        job, operative = load_job([str(path)], bindings)
    except UserError as error:
        assert str(error).strip()
        assert len(str(error).splitlines()) == 1
        return
    assert is_typed(job, type(job))
    path.write_text(operative)
    assert load_job([str(path)]) == (job, operative)


@hypothesis.settings(settings, max_examples=500)
@hypothesis.given(damaged(VALID))
def test_damaged_files(path, text):
    pathlib.Path('piece.gin').write_text(PIECE)
    path.write_text(text)
    load_or_one_line(path)


@hypothesis.settings(settings, max_examples=40)
@hypothesis.given(damaged(PIECE))
def test_damaged_includes(path, text):
    pathlib.Path('piece.gin').write_text(text)
    path.write_text(VALID)
    load_or_one_line(path)


@hypothesis.settings(settings, max_examples=60)
@hypothesis.example('\r\x80')
@hypothesis.example('NAME = "\udce9"')  # how Python shows a byte of the command line that is not UTF-8
@hypothesis.given(st.text(max_size=30) | damaged('jobs.Train.steps = 5') | damaged('NAME = "x"'))
def test_damaged_bindings(path, binding):
    pathlib.Path('piece.gin').write_text(PIECE)
    path.write_text(VALID)
    load_or_one_line(path, binding)


def test_the_undamaged_file_loads(path):
    pathlib.Path('piece.gin').write_text(PIECE)
    path.write_text(VALID)
    assert load_job([str(path)])[0] == Train(
        model=Decoder(num_layers=2, shape=(1, 2.0, 'three'), norm=Norm('layer'), name='ab'),
        draft=Decoder(num_layers=3, name='ab'),
        steps=100,
        files=('x', 'y'),
        rates={'books': 0.5, 'web': 2.0},
        layers=[Layer(), Layer(window=7, bias=True)],
        teacher=Teacher(1e-3),
    )
