"""Every mistake a gin file can have: the whole message is asserted, with file, line and the nearest valid name."""

import importlib
import pathlib
import sys
import textwrap

import pytest

from llm.configuration import load_job
from llm.errors import UserError

# Line 1 of every case is the first line of its own text; these lines come from another file.
BASE = """
from __gin__ import dynamic_registration
from gin_samples import jobs
from gin_samples import models
JOB = @jobs.Train()
jobs.Train.steps = 10
jobs.Train.model = @models.Decoder()
models.Decoder.num_layers = 2
"""
IMPORTS = 'from __gin__ import dynamic_registration\nfrom gin_samples import jobs, models\n'.replace(
    ', models', '\nfrom gin_samples import models'
)


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path('base.gin').write_text(BASE)


def message(text, *bindings, imports=IMPORTS, base=('base.gin',)):
    """The error for base.gin and then the file case.gin, whose line 4 is the first of `text` if it has `imports`."""
    pathlib.Path('case.gin').write_text(imports + textwrap.dedent(text).strip())
    with pytest.raises(UserError) as caught:
        load_job([*base, 'case.gin'], bindings)
    assert '\n' not in str(caught.value)
    return str(caught.value)


SYNTAX = {
    'X = foo': "cannot read the value foo. Write a string in quotes, a reference as @module.Name(), a macro as %NAME.",
    'X = true': 'cannot read the value true. Did you mean True?',
    'X = 1 2': "cannot read 'X = 1 2': Expected newline",
    'X =': "cannot read 'X =': Unable to parse value",
    'X == 3': "cannot read 'X == 3': Couldn't parse statement, expected ':' or '='",
    '= 3': "cannot read '= 3': Unexpected token",
    'imclude "x.gin"': """cannot read 'imclude "x.gin"': Couldn't parse statement, expected ':' or '='. """
    'Did you mean include?',
    'include x.gin': 'cannot read the value x. Write a string in quotes, a reference as @module.Name(), a macro as '
    '%NAME.',
    "X = '\\d'": "cannot read the value '\\d': invalid escape sequence '\\d'. Write a backslash twice.",
    'X = [\n1': 'a bracket or quote opened at or below this line is never closed',
    "X = '''abc": 'a bracket or quote opened at or below this line is never closed',
    'X = {[1]: 2}': 'a list or dict cannot be the key of a dict. Use a string or number.',
    'X = {%Y: 2}': 'a reference cannot be the key of a dict. Use a literal.',
    f'X = {"[" * 60}{"]" * 60}': 'brackets are nested too deeply',
}  # fmt: skip


@pytest.mark.parametrize('text', SYNTAX)
def test_syntax(text):
    assert message(f'\n\n{text}', imports='') == f'case.gin:1: {SYNTAX[text]}'
    assert message(f'A = 1\n# comment\n{text}', imports='').startswith('case.gin:3: ')


def test_syntax_on_the_command_line():
    assert message('', 'FILES=my/*.txt') == (
        "--gin_bindings='FILES=my/*.txt': cannot read the value my. "
        """A string needs quotes of its own: --gin_bindings='FILES="my/*.txt"'."""
    )
    assert message('', 'FILES=/data/x') == (
        "--gin_bindings='FILES=/data/x': cannot read 'FILES=/data/x': Unable to parse value. "
        """A string needs quotes of its own: --gin_bindings='FILES="/data/x"'."""
    )


def test_files_and_includes():
    with pytest.raises(UserError) as caught:
        load_job(['bas.gin'])
    assert str(caught.value) == "the gin file 'bas.gin' does not exist. Did you mean base.gin?"
    pathlib.Path('folder').mkdir()
    with pytest.raises(UserError) as caught:
        load_job(['folder'])
    assert str(caught.value).startswith("'folder' is a folder, not a gin file")
    pathlib.Path('latin.gin').write_bytes('# one\n# caf\xe9\n'.encode('latin-1'))
    assert message("include 'latin.gin'") == 'latin.gin:2: this is not UTF-8 text. Save the file as UTF-8.'
    assert message("include 'base.gn'") == ("case.gin:4: the gin file 'base.gn' does not exist. Did you mean base.gin?")
    pathlib.Path('loop.gin').write_text("\ninclude 'case.gin'")
    assert message("include 'loop.gin'") == "loop.gin:2: 'case.gin' includes itself. Remove the include."
    assert message("include 'folder/\\x00'").startswith("case.gin:4: the gin file 'folder/\\x00' does not exist")


IMPORT_ERRORS = {
    'from gin_samples import modles': 'there is no module gin_samples.modles. Did you mean gin_samples.models?',
    'import gin_smples.models': 'there is no module gin_smples. Did you mean gin_samples?',
    'from gin_samples.models import Decoder': 'there is no module gin_samples.models.Decoder. '
    'gin imports modules only: import gin_samples.models and write models.Decoder.',
    'from gin_samples.models import Nothing': 'there is no module gin_samples.models.Nothing. '
    'gin_samples.models is a module, not a package.',
    'from gin_samples.other import models': 'models is already gin_samples.models in this file. '
    'Import it as another name: gin_samples.other.models as ...',
    'from gin_samples import jobs as gin': 'the name gin is taken by gin itself. Import it as another name.',
    'from __gin__ import dynamic': 'gin has no feature __gin__.dynamic. '
    'Did you mean from __gin__ import dynamic_registration?',
}  # fmt: skip


@pytest.mark.parametrize('text', IMPORT_ERRORS)
def test_imports(text):
    assert message(text) == f'case.gin:4: {IMPORT_ERRORS[text]}'


def test_import_without_dynamic_registration():
    assert message('from gin_samples import jobs', imports='') == (
        'case.gin:1: the first import is not that of dynamic registration. '
        'Write from __gin__ import dynamic_registration above it.'
    )


def test_a_bug_in_an_imported_module_keeps_its_traceback():
    pathlib.Path('case.gin').write_text(f'{IMPORTS}from gin_samples import broken')
    with pytest.raises(ModuleNotFoundError, match='a_dependency_that_is_not_installed'):
        load_job(['case.gin'])


NAMES = {
    'models.Decodr.name = 1': 'models has no Decodr. Did you mean models.Decoder?',
    'models.Decodr:\n  name = 1': 'models has no Decodr. Did you mean models.Decoder?',
    'X = [@models.Nrom()]': 'models has no Nrom. Did you mean models.Norm?',
    'models.Decoder.num_layer = 1': 'models.Decoder has no num_layer. Did you mean num_layers?',
    'models.Norm.zzz = 1': 'models.Norm has no zzz. Valid here: epsilon, kind.',
    'model.Decoder.name = 1': 'model is not imported in this file. Did you mean models.Decoder?',
    'Decoder.name = 1': 'Decoder is not imported in this file. Did you mean models.Decoder?',
    'models.num_layers = 1': 'models is a module. '
    'Valid here: models.Decoder, models.Growing, models.Layer, models.Norm, models.Untyped.',
    'models.Thawed.size = 1': 'models.Thawed is a dataclass that is not frozen. gin binds frozen dataclasses only.',
    'models.NOT_A_CLASS.x = 1': 'models.NOT_A_CLASS is a value of type int. gin binds frozen dataclasses only.',
    'models.relu.x = 1': 'models.relu is a function. gin binds frozen dataclasses only.',
    'X = @models.relu()': 'models.relu is a function. gin binds frozen dataclasses only.',
    'X = @models.Decoder': '@models.Decoder without () is a dataclass, not a function. '
    'Did you mean @models.Decoder()?',
    'X = (1, %STPES)\nSTEPS = 1': '%STPES is not set anywhere. Did you mean STEPS?',
    'X = %REQUIRED': '%REQUIRED is not set anywhere. Did you mean gin.REQUIRED?',
    'X = @gin.singleton()': 'gin is not imported in this file. '
    'Valid here: jobs.Nested, jobs.Train, models.Decoder, models.Growing, models.Layer, models.Norm, models.Untyped.',
}  # fmt: skip


@pytest.mark.parametrize('text', NAMES)
def test_names(text):
    assert message(text) == f'case.gin:4: {NAMES[text]}'


def test_each_file_sees_its_own_imports():
    assert message('models.Decoder.name = 1', imports='from __gin__ import dynamic_registration\n') == (
        'case.gin:2: models is not imported in this file. Add an import of gin_samples.models to it.'
    )


def test_command_line_names():
    assert message('', 'models.Decoder.num_layer=1') == (
        "--gin_bindings='models.Decoder.num_layer=1': models.Decoder has no num_layer. Did you mean num_layers?"
    )
    assert message('', 'Decoder.num_layers=1') == (
        "--gin_bindings='Decoder.num_layers=1': Decoder is not imported by any gin file. Did you mean models.Decoder?"
    )
    imports = 'from __gin__ import dynamic_registration\nfrom gin_samples.other import models\n'
    assert message('', "models.Decoder.name='x'", imports=imports).startswith(
        """--gin_bindings='models.Decoder.name='x'': models is gin_samples.models in one gin file and """
        'gin_samples.other.models in another. Say which: '
    )


def test_set_twice_in_one_file():
    assert message('X = 1\nY = 2\nX = 3') == (
        'case.gin:6: X is already set in line 4 of this file. Remove one of the two.'
    )
    assert message('import gin_samples.models as m\nmodels.Norm.kind = "rms"\nm.Norm.kind = "rms"') == (
        'case.gin:6: m.Norm.kind is already set in line 5 of this file. Remove one of the two.'
    )


def test_unused_macros():
    assert message('', 'STEP=5') == (
        "--gin_bindings='STEP=5': STEP is set, but nothing that JOB needs refers to %STEP. Remove it, or refer to it."
    )
    steps = 'STEPS = 1\njobs.Train.steps = %STEPS'
    assert message(steps, 'STPES=5') == (
        "--gin_bindings='STPES=5': STPES is set, but nothing that JOB needs refers to %STPES. Did you mean STEPS?"
    )
    # No near name: the macros that do something are listed, in the order of the files.
    knobs = 'WIDTH = 2\nSTEPS = 1\njobs.Train.steps = %STEPS\nmodels.Decoder.num_layers = %WIDTH'
    assert message(knobs, 'DESTINATION="x"') == (
        '--gin_bindings=\'DESTINATION="x"\': DESTINATION is set, but nothing that JOB needs refers to %DESTINATION. '
        'Its knobs are: WIDTH, STEPS.'
    )
    # A macro set where the line that uses it is overridden by another file would be ignored in silence.
    assert message(steps, 'jobs.Train.steps=5', 'STEPS=6') == (
        "--gin_bindings='STEPS=6': STEPS is set, but nothing that JOB needs refers to %STEPS. "
        'jobs.Train.steps at case.gin:5 does, but is overridden.'
    )


UNUSED = {
    'models.Norm.epsilon = 1': 'models.Norm.epsilon is set, but nothing that JOB needs refers to @models.Norm(). '
    'Write models.Decoder.norm = @models.Norm(), or remove it.',
    'jobs.Nested.steps = 1': 'jobs.Nested.steps is set, but nothing that JOB needs refers to @jobs.Nested(). '
    'Remove it.',
    'trian/models.Decoder.name = "x"\njobs.Train.model = @train/models.Decoder()': 'trian/models.Decoder.name is set, '
    'but JOB uses no models.Decoder in scope trian. Did you mean train?',
    'train/models.Decoder.name = "x"': 'train/models.Decoder.name is set, but JOB uses no models.Decoder in scope '
    'train. It is used without a scope.',
    'x/models.Decoder.name = "x"\njobs.Train.model = @train/models.Decoder()': 'x/models.Decoder.name is set, '
    'but JOB uses no models.Decoder in scope x. Its scopes are: train.',
}  # fmt: skip


@pytest.mark.parametrize('text', UNUSED)
def test_unused_bindings(text):
    assert message(text) == f'case.gin:4: {UNUSED[text]}'


def test_required():
    text = """
        FILES = %gin.REQUIRED   # glob of text files
        jobs.Train.files = %FILES
        jobs.Train.steps = %gin.REQUIRED
        """
    assert message(text, 'jobs.Train.steps=3') == (
        'case.gin:4: FILES must be set (glob of text files). Set FILES: --gin_bindings=\'FILES="..."\''
    )
    assert message(text, 'FILES="x"') == (
        "case.gin:6: jobs.Train.steps must be set. Set jobs.Train.steps: --gin_bindings='jobs.Train.steps=...'"
    )
    assert message(text) == (
        'case.gin:6: jobs.Train.steps and FILES must be set. Set jobs.Train.steps and FILES: '
        "--gin_bindings='jobs.Train.steps=...' --gin_bindings='FILES=\"...\"'"
    )


def test_job():
    job = 'no gin file sets JOB, so nothing says what to run. '
    assert message('', base=()) == f'{job}Start from a run file in gin_configs/runs, or write JOB = @module.Job().'
    assert message('JBO = @jobs.Train()', base=()) == f'{job}Did you mean JOB where case.gin:4 says JBO?'
    fix = 'Refer to one: JOB = @pretrain.Pretrain(), for example.'
    assert message('JOB = 3', base=()) == f'case.gin:4: JOB is 3 (int). {fix}'
    assert message('JOB = @models.relu', base=()) == f'case.gin:4: JOB is the function relu. {fix}'
    assert message('JOB = @models.Norm()', base=()) == (
        f'case.gin:4: JOB refers to models.Norm, which is a config but no job. {fix}'
    )


def test_circles():
    assert message('A = %B\nB = (1, %A)\njobs.Train.steps = %A') == (
        'case.gin:4: circular: %A -> %B -> %A. Break the circle.'
    )
    assert message('JOB = @jobs.Nested()\njobs.Nested.inner = @jobs.Nested()', base=()) == (
        'case.gin:5: circular: @Nested() -> @Nested(). Break the circle.'
    )


def test_missing_fields():
    assert message('JOB = @jobs.Train()\njobs.Train.model = @x/models.Decoder()', base=()) == (
        'case.gin:4: jobs.Train.steps is not set and has no default. Write jobs.Train.steps = a value of type int.'
    )
    assert message('JOB = @jobs.Train()\njobs.Train.steps = 1', base=()) == (
        'case.gin:4: jobs.Train.model is not set and has no default. Write jobs.Train.model = @models.Decoder().'
    )
    assert message('jobs.Train.draft = @x/models.Decoder()\nmodels.Decoder.num_layers = 1\n', base=()).startswith(
        'no gin file sets JOB'
    )


TYPES = {
    'jobs.Train.steps = "12"': "jobs.Train.steps takes int, not '12' (str). Write it without quotes.",
    'jobs.Train.steps = 1.5': 'jobs.Train.steps takes int, not 1.5 (float)',
    'jobs.Train.steps = 1e3': 'jobs.Train.steps takes int, not 1000.0 (float). Write 1000.',
    'jobs.Train.steps = True': 'jobs.Train.steps takes int, not True (bool)',
    'jobs.Train.steps = None': 'jobs.Train.steps takes int, not None',
    'jobs.Train.steps = %STEPS\nSTEPS = 5': None,
    'models.Decoder.dropout = False': 'models.Decoder.dropout takes float, not False (bool)',
    'models.Decoder.dropout = 1' + '0' * 400: 'models.Decoder.dropout takes float, not '
    f'1{"0" * 59} ... {"0" * 14} (int). It is too large.',
    'models.Decoder.name = 5': 'models.Decoder.name takes str, not 5 (int). Write it in quotes.',
    'models.Decoder.shape = (1, 2)': 'models.Decoder.shape takes tuple[int, float, str], not (1, 2) (tuple). '
    'It takes 3 elements.',
    'models.Decoder.shape = (1, 2, 3)': 'models.Decoder.shape[2] takes str, not 3 (int). Write it in quotes.',
    'models.Decoder.norm = 3': 'models.Decoder.norm takes Norm or None, not 3 (int)',
    'models.Decoder.norm = @models.Layer()': 'models.Decoder.norm takes Norm or None, not a Layer',
    'models.Decoder.norm = @models.relu': 'models.Decoder.norm takes Norm or None, not the function relu',
    'models.Decoder.pattern = @models.Layer()': 'models.Decoder.pattern takes tuple[Layer, ...], not a Layer. '
    'Write (@...,) for one.',
    'models.Decoder.pattern = (@models.Layer(), @models.Norm())': 'models.Decoder.pattern[1] takes Layer, '
    'not a Norm',
    'models.Decoder.norm = @models.Norm()\nmodels.Norm.kind = "rsm"': None,
    'jobs.Train.files = [1]': 'jobs.Train.files[0] takes str, not 1 (int). Write it in quotes.',
    'jobs.Train.files = 1': 'jobs.Train.files takes str or tuple[str, ...], not 1 (int). Write it in quotes.',
    'jobs.Train.rates = {"a": "b"}': "jobs.Train.rates['a'] takes float, not 'b' (str)",
    'jobs.Train.rates = {1: 2.0}': 'jobs.Train.rates[1] takes str, not 1 (int). Write it in quotes.',
    'jobs.Train.rates = 3': 'jobs.Train.rates takes dict[str, float], not 3 (int)',
    'jobs.Train.number = True': 'jobs.Train.number takes float or int, not True (bool)',
    'jobs.Train.activation = "relu"': "jobs.Train.activation takes a function, not 'relu' (str)",
    'jobs.Train.failure = "usr"': "jobs.Train.failure takes 'none' or 'user' or 'bug' or 'interrupt', "
    "not 'usr' (str). Did you mean 'user'?",
}  # fmt: skip


@pytest.mark.parametrize('text', [text for text, expected in TYPES.items() if expected])
def test_types(text):
    assert message(text) == f'case.gin:4: {TYPES[text]}'


def test_types_through_macros_and_scopes():
    text = 'N = 2\njobs.Train.steps = %N\nmodels.Decoder.shape = (1, %N, "x")'
    assert message(text, 'N="many"') == (
        """--gin_bindings='N="many"': models.Decoder.shape[1] takes float, not 'many' (str), from %N"""
    )
    assert message(f'{text.replace("Train.steps", "Train.number")}\n', 'N=None') == (
        "--gin_bindings='N=None': models.Decoder.shape[1] takes float, not None, from %N"
    )
    text = 'jobs.Train.draft = @x/models.Decoder()\nx/models.Decoder.bias = 1'
    assert message(text) == (
        'case.gin:5: models.Decoder has no bias. Valid here: dropout, name, norm, num_layers, pattern, shape.'
    )
    text = 'jobs.Train.draft = @x/models.Decoder()\nx/models.Decoder.num_layers = None'
    assert message(text) == 'case.gin:5: x/models.Decoder.num_layers takes int, not None'


def test_a_field_that_gin_cannot_set():
    text = 'JOB = @models.Untyped()\nmodels.Untyped.anything = 3'
    assert message(text, base=()).startswith('case.gin:4: JOB refers to models.Untyped')
    text = 'jobs.Train.layers = [@models.Untyped()]\nmodels.Untyped.anything = 3'
    assert message(text) == 'case.gin:5: models.Untyped.anything takes Any, not 3 (int)'


def test_a_config_that_refuses_its_values():
    refusal = 'window 0 is not positive. Use 1 or more.'
    text = 'models.Decoder.pattern = (@models.Layer(),)\nW = 0\nmodels.Layer.window = %W'
    assert message(text) == f'case.gin:5: {refusal}'


def test_nothing_is_imported_before_all_files_are_read():
    sys.modules.pop('gin_samples.broken', None)
    importlib.invalidate_caches()
    assert message('from gin_samples import broken\nX = foo').startswith('case.gin:5: cannot read the value foo')
