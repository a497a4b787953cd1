"""What valid gin files mean: values, includes, macros, scopes, the operative config; gin itself is the oracle."""

import dataclasses
import inspect
import math
import pathlib

import gin
import pytest
from gin_samples.jobs import Nested, Train
from gin_samples.models import Decoder, Layer, Norm, relu
from gin_samples.other.models import Teacher

from llm.configuration import files, load_job

HEADER = """
from __gin__ import dynamic_registration
from gin_samples import jobs
from gin_samples import models
JOB = @jobs.Train()
"""
MINIMAL = f"""{HEADER}
jobs.Train.steps = 10
jobs.Train.model = @models.Decoder()
models.Decoder.num_layers = 2
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Resolves a text as a file of its own in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def load(text, *bindings):
        pathlib.Path('run.gin').write_text(inspect.cleandoc(text))
        return load_job(['run.gin'], bindings)

    return load


def test_every_kind_of_value(load):
    job, _ = load(f"""{MINIMAL}
jobs.Train.files = ['a', "b"]                      # a list for a tuple
jobs.Train.rates = {{'books': 1, 'web': %RATE}}    # an int for a float
jobs.Train.number = 3                              # int is a member of the union: not converted
jobs.Train.layers = [@models.Layer(), @wide/models.Layer()]
jobs.Train.activation = @models.relu
models.Decoder.shape = (-1, 2, 'x' 'y')
models.Decoder:
  dropout = 1e-1
  norm = @models.Norm()
wide/models.Layer.window = 7
RATE = 2.5
""")
    assert job == Train(
        model=Decoder(num_layers=2, shape=(-1, 2.0, 'xy'), dropout=0.1, norm=Norm()),
        steps=10,
        files=('a', 'b'),
        rates={'books': 1.0, 'web': 2.5},
        number=3,
        layers=[Layer(), Layer(window=7)],
        activation=relu,
    )
    assert type(job.rates['books']) is float
    assert type(job.number) is int
    assert type(job.model.shape[1]) is float


def test_later_settings_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path('pieces').mkdir()
    pathlib.Path('pieces/model.gin').write_text("""
from __gin__ import dynamic_registration
from gin_samples import models as m
LAYERS = 1
NAME = 'small'
m.Decoder.num_layers = %LAYERS
m.Decoder.name = %NAME
MODEL = @m.Decoder()
""")
    pathlib.Path('run.gin').write_text("""
from __gin__ import dynamic_registration
from gin_samples import jobs
include 'pieces/model.gin'
JOB = @jobs.Train()
LAYERS = 2
jobs.Train.model = %MODEL
jobs.Train.steps = 1
""")
    pathlib.Path('last.gin').write_text('LAYERS = 3')
    assert load_job(['run.gin'])[0] == Train(model=Decoder(num_layers=2, name='small'), steps=1)
    assert load_job(['run.gin', 'last.gin'])[0].model.num_layers == 3
    assert load_job(['run.gin', 'last.gin'], ['LAYERS = 4', 'LAYERS = 5'])[0].model.num_layers == 5
    # A binding on the command line may use any file's imports, or its own; NAME of the piece is then not needed.
    assert load_job(['run.gin'], ["m.Decoder.name = 'big'"])[0].model.name == 'big'
    own_import = ['from gin_samples.other import models as others', 'others.Teacher.temperature = 2']
    own_import.append('jobs.Train.teacher = @others.Teacher()')
    assert load_job(['run.gin'], own_import)[0].teacher == Teacher(temperature=2.0)


def test_all_forms_of_import(load):
    job, _ = load("""
        from __gin__ import dynamic_registration
        import gin_samples.jobs
        import gin_samples.models as m
        from gin_samples import models as n
        JOB = @gin_samples.jobs.Train()
        gin_samples.jobs.Train.steps = 1
        gin_samples.jobs.Train.model = @n.Decoder()
        m.Decoder.num_layers = 4
        """)
    assert job == Train(model=Decoder(num_layers=4), steps=1)


def test_files_are_found_beside_the_package(tmp_path, monkeypatch):
    work, package = tmp_path / 'work', tmp_path / 'package'
    for folder in (work, package / 'pieces'):
        folder.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setattr(files, 'ROOTS', (pathlib.Path(), package))
    (package / 'pieces/steps.gin').write_text('STEPS = 7')
    (package / 'run.gin').write_text(f"{MINIMAL}\nwork/jobs.Train.steps = %STEPS\ninclude 'pieces/steps.gin'".replace(
        '@jobs', '@work/jobs'
    ))  # fmt: skip
    assert load_job(['run.gin'])[0].steps == 7
    (work / 'pieces').mkdir()
    (work / 'pieces/steps.gin').write_text('STEPS = 8')  # the working directory comes first
    assert load_job(['run.gin'])[0].steps == 8


SCOPED = f"""{HEADER}
jobs.Train.steps = %STEPS
STEPS = 3
jobs.Train.model = @big/models.Decoder()
jobs.Train.draft = %DRAFT
DRAFT = @models.Decoder()
models.Decoder.num_layers = 1
models.Decoder.norm = @models.Norm()
big/models.Decoder.num_layers = 2
big/models.Decoder.pattern = (@models.Layer(), @big/local/models.Layer(), %LAYER)
LAYER = @models.Layer()
models.Layer.norm = @models.Norm()
models.Layer.bias = True
big/models.Norm.epsilon = 0.5
big/local/models.Layer.window = 4
big/local/models.Norm.kind = 'layer'
LAYER/models.Norm.epsilon = 0.25
DRAFT/models.Decoder.name = 'draft'
"""


def test_scopes(load):
    wide, local, macro = Norm('rms', 0.5), Norm('layer', 0.5), Norm('rms', 0.25)
    assert load(SCOPED)[0] == Train(
        steps=3,
        model=Decoder(
            num_layers=2,
            norm=wide,
            pattern=(Layer(None, wide, True), Layer(4, local, True), Layer(None, macro, True)),
        ),
        draft=Decoder(num_layers=1, norm=Norm(), name='draft'),
    )


@pytest.mark.parametrize('text', [MINIMAL, SCOPED], ids=['minimal', 'scoped'])
def test_gin_itself_makes_the_same_job(load, text):
    gin.clear_config()
    gin.parse_config(text)
    assert load(text)[0] == gin.get_configurable('JOB/gin.macro')()


def test_operative_config_is_canonical(load):
    expected = """\
# The whole configuration of one run, defaults included; the run is repeated by
#   python -m llm.main --gin_file=<this file>
from __gin__ import dynamic_registration
from gin_samples import jobs
from gin_samples import models as gin_samples_models
from gin_samples.other import models as gin_samples_other_models

JOB = @jobs.Train()

jobs.Train.model = @model/gin_samples_models.Decoder()
jobs.Train.steps = 10
jobs.Train.files = ('a',)
jobs.Train.rates = {'x': 1.0}
jobs.Train.number = 1e999
jobs.Train.draft = @draft/gin_samples_models.Decoder()
jobs.Train.teacher = @gin_samples_other_models.Teacher()
jobs.Train.layers = []
jobs.Train.activation = @gin_samples_models.relu
jobs.Train.failure = 'none'

model/gin_samples_models.Decoder.num_layers = 2
model/gin_samples_models.Decoder.pattern = (@gin_samples_models.Layer(),)
model/gin_samples_models.Decoder.dropout = 0.0
model/gin_samples_models.Decoder.name = 'decoder'
model/gin_samples_models.Decoder.shape = (1, 2.0, 'three')
model/gin_samples_models.Decoder.norm = None

gin_samples_models.Layer.window = None
gin_samples_models.Layer.norm = @gin_samples_models.Norm()
gin_samples_models.Layer.bias = False

gin_samples_models.Norm.kind = 'rms'
gin_samples_models.Norm.epsilon = 1e-06

draft/gin_samples_models.Decoder.num_layers = 1
draft/gin_samples_models.Decoder.pattern = (@gin_samples_models.Layer(),)
draft/gin_samples_models.Decoder.dropout = 0.0
draft/gin_samples_models.Decoder.name = 'decoder'
draft/gin_samples_models.Decoder.shape = (1, 2.0, 'three')
draft/gin_samples_models.Decoder.norm = None

gin_samples_other_models.Teacher.temperature = 1.0
"""
    job, operative = load(f"""{MINIMAL}
jobs.Train.files = ['a']
jobs.Train.rates = {{'x': 1}}
jobs.Train.number = 1e999
jobs.Train.draft = @d/models.Decoder()
d/models.Decoder.num_layers = 1
""")
    assert operative == expected
    assert load(operative) == (job, expected)
    assert job.number == math.inf


def test_operative_config_does_not_depend_on_how_the_job_was_written(load):
    _, one = load(f'{MINIMAL}\njobs.Train.files = %FILES\nFILES = ("x",)\nmodels.Decoder.dropout = 0')
    _, other = load(
        """
        from __gin__ import dynamic_registration
        import gin_samples.models as zoo
        from gin_samples import jobs as work
        N = 2
        a/zoo.Decoder.num_layers = %N
        work.Train.model = @a/zoo.Decoder()
        work.Train.steps = 99
        JOB = @work.Train()
        """,
        'work.Train.steps = 10',
        "work.Train.files = ['x']",
    )
    assert one == other


def test_a_class_inside_itself_round_trips(load):
    job, operative = load("""
        from __gin__ import dynamic_registration
        from gin_samples import jobs
        JOB = @jobs.Nested()
        jobs.Nested.inner = @a/jobs.Nested()
        a/jobs.Nested.inner = @b/jobs.Nested()
        b/jobs.Nested.inner = None
        b/jobs.Nested.steps = 5
        """)
    assert job == Nested(Nested(Nested(steps=5)))
    assert 'JOB = @job/jobs.Nested()' in operative
    assert load(operative) == (job, operative)


def test_configs_are_frozen_and_of_their_own_class(load):
    job, _ = load(MINIMAL)
    assert type(job) is Train
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.steps = 11


def test_defaults_have_the_types_that_reading_them_back_gives(load):
    job, operative = load(MINIMAL)
    assert Decoder.dropout == 0
    assert type(Decoder.dropout) is int
    assert type(job.model.dropout) is float
    assert 'models.Decoder.dropout = 0.0' in operative


def test_a_config_that_reading_back_would_change_is_a_bug(load):
    text = """
        from __gin__ import dynamic_registration
        from gin_samples import models
        JOB = @models.Growing()
        """
    with pytest.raises(TypeError, match='Growing changes when written and read again'):
        load(text)
