"""A pretraining run small enough for a test, started as a person starts one: a gin file, a corpus, `main`."""

import json
import random
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from llm.main import main
from llm.training.checkpoints import committed_steps
from llm.training.metrics import read_json_lines

RUN = """
include 'gin_configs/jobs/pretrain.gin'
include 'gin_configs/models/tiny.gin'
include 'gin_configs/data/text_files.gin'
include 'gin_configs/optimizers/adamw.gin'
include 'gin_configs/meshes/data_parallel.gin'
from __gin__ import dynamic_registration
from llm.data import datasets
from llm.data.sources import text_files
from llm.data.vocabularies import special_tokens
from llm.data.vocabularies import training
from llm.jobs import pretrain
from llm.jobs import sampling
from llm.models import attention
from llm.models import decoder
from llm.models import layer
from llm.parallel import mesh
from llm.training import checkpoints
from llm.training import loop
from llm.training import optimizers
from llm.training import step

FILES = {files!r}
VALIDATION_FRACTION = 0.2
RUN_DIRECTORY = {directory!r}
VOCAB_SIZE = 264
D_MODEL = 16
NUM_HEADS = 2
NUM_KV_HEADS = 2
HEAD_DIM = 8
D_FF = 32
TOTAL_STEPS = 12
WARMUP_STEPS = 2
BATCH_SIZE = 4
SEQUENCE_LENGTH = 32
EVALUATE_EVERY = 6
SAVE_EVERY = 3
training.VocabularyConfig.kind = 'bytes'
datasets.DataConfig.workers = 1
mesh.MeshConfig.data = 1
"""


def corpus(path: Path, documents: int = 40) -> Path:
    """A .jsonl file of short documents of made-up words, the same each time."""
    generator = random.Random(0)
    words = [''.join(generator.choices('abcdefghij', k=generator.randint(1, 7))) for _ in range(50)]
    texts = [' '.join(generator.choices(words, k=60)) for _ in range(documents)]
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    return path


class TinyRun:
    """A folder with a corpus and a gin file, and what comes of running it.

    Attributes:
        arguments: of llm.main. directory: the run directory. checkpoints: the folder of its checkpoints.
    """

    def __init__(self, folder: Path):
        self.folder, self.directory, self.checkpoints = folder, folder / 'run', folder / 'run' / 'checkpoints'
        self.corpus = corpus(folder / 'corpus.jsonl')
        (folder / 'run.gin').write_text(RUN.format(files=str(self.corpus), directory=str(self.directory)))
        self.arguments = [f'--gin_file={folder / "run.gin"}']

    def __call__(self, *bindings: str) -> int:
        """Run it in this process with more gin bindings; the exit code."""
        return main([*self.arguments, *(f'--gin_bindings={binding}' for binding in bindings)])

    def steps(self) -> list[int]:
        """Of the checkpoints."""
        return committed_steps(self.checkpoints)

    def metrics(self, kind: str) -> list[dict]:
        """The lines of metrics.jsonl of one kind."""
        return [line for line in read_json_lines(self.directory / 'metrics.jsonl') if line['kind'] == kind]


@pytest.fixture(scope='session')
def compiled(tmp_path_factory):
    """A folder in which programs are kept for all runs of the session: most have the same."""
    return tmp_path_factory.mktemp('compiled')


@pytest.fixture
def tiny_run(tmp_path, monkeypatch, compiled):
    """A TinyRun with a token cache of its own."""
    monkeypatch.setenv('LLM_CACHE', str(tmp_path / 'tokens'))
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(compiled))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update('jax_compilation_cache_dir', str(compiled))
    compilation_cache.reset_cache()  # whether there is one is decided at the first compilation of the process
    yield TinyRun(tmp_path)
    jax.config.update('jax_compilation_cache_dir', before)
    compilation_cache.reset_cache()
