"""Samples during training: the same file whether or not the run was interrupted, and nothing that breaks it."""

import dataclasses

import pytest

from llm.data.vocabularies import ByteVocabulary
from llm.errors import UserError
from llm.inference.sampling import SamplingConfig
from llm.jobs.sampling import Sample, SamplesConfig, format_samples, sample_to_file
from llm.parallel.mesh import MeshConfig
from llm.training.metrics import read_json_lines
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.models.small_decoders import decoder_config

VOCABULARY = ByteVocabulary()
CONFIG = SamplesConfig(prompts=('def f', '', 'é'), max_new_tokens=12, seed=3)


def trainer(mesh=MeshConfig(data=1), **changes):
    model = decoder_config(vocab_size=264, num_layers=1, **changes)  # a few more tokens than the vocabulary has
    return Trainer(model, OptimizerConfig(), StepConfig(batch_size=8, sequence_length=16), 10, mesh)


@pytest.fixture(scope='module')
def small():
    made = trainer()
    return made, made.fresh_state()['parameters']


def test_a_line_per_prompt_and_the_same_for_the_same_parameters(small, tmp_path):
    made, parameters = small
    write = sample_to_file(CONFIG, made, VOCABULARY, tmp_path / 'samples.jsonl', 0)
    first = write(parameters, 5)
    second = write(parameters, 10)
    lines = read_json_lines(tmp_path / 'samples.jsonl')
    assert lines == [dataclasses.asdict(sample) for sample in (*first, *second)]
    assert [(line['step'], line['prompt']) for line in lines] == [(s, p) for s in (5, 10) for p in CONFIG.prompts]
    assert [s.continuation for s in first] == [s.continuation for s in second]
    assert len({s.continuation for s in first}) == 3
    assert write.last == second


def test_resuming_gives_the_file_of_a_run_never_killed(small, tmp_path):
    made, parameters = small
    path = tmp_path / 'samples.jsonl'
    write = sample_to_file(CONFIG, made, VOCABULARY, path, 0)
    write(parameters, 5)
    write(parameters, 10)
    whole = path.read_bytes()
    write = sample_to_file(CONFIG, made, VOCABULARY, path, 5)
    assert len(read_json_lines(path)) == 3
    write(parameters, 10)
    assert path.read_bytes() == whole


def test_each_prompt_is_continued_as_if_alone_and_on_any_mesh(small, tmp_path):
    made, parameters = small
    together = sample_to_file(CONFIG, made, VOCABULARY, tmp_path / 'a.jsonl', 0)(parameters, 1)
    first = dataclasses.replace(CONFIG, prompts=CONFIG.prompts[:1])
    assert sample_to_file(first, made, VOCABULARY, tmp_path / 'b.jsonl', 0)(parameters, 1) == together[:1]
    sharded = trainer(MeshConfig(data=2, tensor=2))
    spread = sharded.fresh_state()['parameters']
    assert sample_to_file(CONFIG, sharded, VOCABULARY, tmp_path / 'c.jsonl', 0)(spread, 1) == together


def test_a_prompt_longer_than_the_positions_is_refused_before_training(tmp_path):
    made = trainer(position='learned', max_positions=16)
    config = dataclasses.replace(CONFIG, prompts=('ok', 'much too long a text'))
    with pytest.raises(UserError, match='prompt 2: the prompt has 21 tokens, but the model has 16 positions'):
        sample_to_file(config, made, VOCABULARY, tmp_path / 'samples.jsonl', 0)


@pytest.mark.parametrize('changes', [{'prompts': ()}, {'max_new_tokens': 0}, {'seed': -1}, {'seed': 2**32}])
def test_settings_out_of_range(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        SamplesConfig(**changes)


def test_formatted_for_reading():
    samples = [Sample(5, 'a', ' cat\n'), Sample(5, '', 'x')]
    assert format_samples(samples) == "--- step 5, continuing 'a' ---\na cat\n--- step 5, continuing '' ---\nx"
    assert SamplesConfig().sampling == SamplingConfig(temperature=0.8, top_p=0.95)
