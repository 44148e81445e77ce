"""The simulation of padding plans with the learner's own code and reaches what it is to reach."""

import numpy as np
import pytest

from benchmarks import simulate_padding
from configs import tpu_v5e


def test_drawn_lengths_are_those_that_are_described():
    lengths = simulate_padding.draw_lengths((4096, 8), 2048, 0)
    assert lengths.min() >= 1 and lengths.max() == 2048
    assert lengths.mean() == pytest.approx(265, rel=0.05)
    assert np.mean(lengths == 2048) == pytest.approx(0.01, rel=0.2)


def test_responses_of_the_3b_on_64_chips_are_padded_little():
    config = tpu_v5e.get_config("3b,chips=64")
    found = simulate_padding.simulate_padding(config, 64, "splash", steps=3)
    assert found.before == pytest.approx(0.13, abs=0.01)
    assert found.after >= 0.7
    assert found.all_shapes <= 12
