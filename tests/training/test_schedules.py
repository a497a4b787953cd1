import math

import numpy as np
import pytest

from llm.errors import UserError
from llm.training.schedules import ScheduleConfig, make_schedule


def _values(config, total=10, peak=2.0):
    schedule = make_schedule(config, peak, total)
    return [float(schedule(step)) for step in range(total)]


def test_cosine_with_warmup():
    values = _values(ScheduleConfig('cosine', warmup_steps=4, final_fraction=0.1))
    expected = [0.5, 1.0, 1.5, 2.0] + [0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_linear_falls_to_its_final_fraction():
    values = _values(ScheduleConfig('linear', final_fraction=0.5), total=10, peak=1.0)
    np.testing.assert_allclose(values, [1 - 0.05 * i for i in range(10)], rtol=1e-6)


def test_stable_decay_is_flat_then_linear():
    values = _values(ScheduleConfig('stable_decay', warmup_steps=2, final_fraction=0.0, decay_fraction=0.4), peak=1.0)
    np.testing.assert_allclose(values, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25], rtol=1e-6)


def test_constant():
    assert _values(ScheduleConfig('constant')) == [2.0] * 10


def test_out_of_range_values_are_refused():
    with pytest.raises(UserError, match='out of range'):
        ScheduleConfig(final_fraction=1.5)
    with pytest.raises(UserError, match='warm-up of 11 steps is longer than the run of 10'):
        make_schedule(ScheduleConfig(warmup_steps=11), 1.0, 10)
