"""The simulation drives the engine's own loop, and counts what it takes."""

import argparse

import numpy as np
import pytest

from benchmarks.options import whole
from benchmarks.simulate import Case, simulate
from emor3_jax.rollout.engine import Plan


def test_a_seed_is_a_whole_number_of_at_least_0() -> None:
    assert whole(0)("3") == 3
    for text in ("-1", "1.5", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number of at least"):
            whole(0)(text)


def test_counts_of_a_few_responses_are_those_by_hand() -> None:
    # Two prompts of two responses in one lane: 3 + 1 + 2 + 2 tokens, one after the other.
    lengths = np.asarray([[3, 1], [2, 2]])
    found = simulate(lengths, Case("one", 1, 2, 2, 1), Plan(block=4))
    assert (found.steps, found.lane_steps, found.tokens) == (8, 8, 8)
    # Each token needs those before it: 0 + 1 + 2, 0, 0 + 1, 0 + 1.
    assert found.needed == 5


def test_two_lanes_share_the_responses() -> None:
    lengths = np.asarray([[3, 1], [2, 2]])
    found = simulate(lengths, Case("one", 1, 2, 2, 2), Plan(block=8))
    # Lane 0: 3 and the last 2; lane 1: 1 and 2.
    assert (found.steps, found.lane_steps, found.tokens) == (5, 10, 8)


def test_every_part_waits_for_the_fullest() -> None:
    lengths = np.asarray([[4, 4], [1, 1]])
    found = simulate(lengths, Case("two", 2, 1, 1, 2), Plan(block=8, halvings=0))
    assert (found.steps, found.lane_steps, found.tokens) == (4, 16, 10)
