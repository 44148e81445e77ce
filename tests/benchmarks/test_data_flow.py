"""The release's data flow beside this program's: by hand, as properties, at the release's shape."""

import dataclasses
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_flops import STEP, TINY

import emor3_jax
from benchmarks.data_flow import LAYOUTS, layout_costs
from emor3_jax.flops import (
    PHASES,
    Cost,
    QuestionTokens,
    ShapeError,
    StepShapes,
    phase_costs,
    total,
)
from emor3_jax.flops.cost import decoder_flops, logits_flops
from emor3_jax.models import published

ROOT = Path(emor3_jax.__file__).parents[1]


def test_the_step_of_the_release_by_hand() -> None:
    costs = layout_costs(TINY, STEP, "release")
    assert costs["vision"] == Cost(0, 2, 2, 2 * 25088, 2 * 24576)
    # 12 tokens (78 pairs) and the logits of the last one, once for the group.
    assert costs["prefill"] == Cost(24, 0, 0, 2 * (12 * 1728 + 320), 2 * 78 * 64)
    # 4 tokens of each response: 4*12 + 10 pairs.
    assert costs["decode"] == Cost(24, 0, 0, 24 * (1728 + 320), 6 * 58 * 64)
    # 9 tokens (45 pairs), and one of the reply (10 pairs).
    assert costs["coherence"] == Cost(60, 0, 0, 60 * 1728 + 12 * 320, 6 * 55 * 64)
    # 6 images; 14 tokens (105 pairs), and one of the reply (15 pairs).
    assert costs["consistency"] == Cost(
        90, 6, 6, 6 * 25088 + 90 * 1728 + 12 * 320, 6 * 24576 + 6 * 120 * 64
    )
    # 6 images; 17 tokens, all with logits (153 pairs).
    score = Cost(102, 6, 6, 6 * 25088 + 102 * (1728 + 320), 6 * 24576 + 6 * 153 * 64)
    assert costs["old"] == costs["reference"] == score
    # Recomputed: all layers, 102*1728 and 6*32*2*272, and all attention.
    again = 176256 + 104448 + score.attention
    assert costs["update"] == Cost(306, 6, 18, 3 * score.linear, 3 * score.attention, again)
    assert layout_costs(TINY, STEP, "release", remat=False)["update"].recomputed == 0


def test_what_the_engine_of_the_release_may_share_by_hand() -> None:
    usual = layout_costs(TINY, STEP, "release")
    least = layout_costs(TINY, STEP, "release_cached")
    most = layout_costs(TINY, STEP, "release_uncached")
    for phase in ("decode", "old", "reference", "update"):
        assert usual[phase] == least[phase] == most[phase]
    assert least["vision"] == usual["vision"] and least["prefill"] == usual["prefill"]
    assert least["coherence"] == phase_costs(TINY, STEP)["coherence"]
    # An image and 9 tokens (45 pairs) for each prompt, then what the grouped program reads.
    shared = Cost(18, 2, 2, 2 * (25088 + 9 * 1728), 2 * (24576 + 45 * 64))
    assert least["consistency"] == shared + phase_costs(TINY, STEP)["consistency"]
    # 3 questions fall into 8 * (1 - (7/8)**3) = 8 * 169/512 = 2.640625 of 8 engines on average; all
    # 6 heads may be in different ones.
    spread = layout_costs(TINY, STEP, "release_spread")
    expected = shared.times(2.640625) + phase_costs(TINY, STEP)["consistency"]
    assert spread == usual | {"consistency": expected}
    wide = layout_costs(TINY, STEP._replace(prompts=4), "release_spread")["coherence"]
    assert wide.tokens == 8 * 3 + 12 * 7
    assert most["vision"] == usual["vision"].times(3)
    assert most["prefill"] == usual["prefill"].times(3)
    assert most["coherence"] == usual["coherence"] and most["consistency"] == usual["consistency"]


def test_the_release_samples_its_replies() -> None:
    question = QuestionTokens(head=3, text=4, tail=2, reply=3, replies=4)
    sampled = question._replace(replies=1)
    flat = [
        layout_costs(TINY, STEP._replace(questions={"coherence": q}), "release")["coherence"]
        for q in (question, sampled)
    ]
    assert flat[0] == flat[1]


def test_phases_that_are_switched_off_cost_nothing_in_any_layout() -> None:
    plain = STEP._replace(questions={})
    for layout in LAYOUTS:
        costs = layout_costs(TINY, plain, layout, reference=False)
        assert tuple(costs) == PHASES and costs["reference"] == Cost()


# The fourth has an expected value in it.
EXACT = st.sampled_from([layout for layout in LAYOUTS if layout != "release_spread"])


STEPS = st.builds(
    lambda b, g, image, around, t, coherence, consistency: StepShapes(
        b,
        g,
        image + around + 2,
        t,
        4 * image,
        image + 1,
        ({} if coherence is None else {"coherence": coherence})
        | ({} if consistency is None else {"consistency": consistency._replace(with_image=True)}),
    ),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(0, 30),
    st.integers(1, 50),
    *[
        st.none()
        | st.builds(
            QuestionTokens,
            st.integers(0, 9),
            st.integers(0, 30),
            st.integers(1, 9),
            st.integers(1, 5),
            st.integers(1, 4),
        )
    ]
    * 2,
)


@given(STEPS, EXACT)
def test_costs_are_whole_numbers_and_linear_in_prompts(s: StepShapes, layout: str) -> None:
    one, two, three = (
        total(layout_costs(TINY, s._replace(prompts=s.prompts * n), layout)) for n in (1, 2, 3)
    )
    assert all(isinstance(value, int) for value in dataclasses.astuple(one))
    # What is done once a batch, the head of the coherence question, does not grow.
    assert one + three == two.times(2)
    if "coherence" not in s.questions:
        assert two == one.times(2)


@given(STEPS, st.sampled_from(LAYOUTS))
def test_a_longer_response_costs_more(s: StepShapes, layout: str) -> None:
    one, two = (
        layout_costs(TINY, s._replace(response_tokens=s.response_tokens + n), layout)
        for n in (0, 1)
    )
    for phase in PHASES:
        assert two[phase].flops >= one[phase].flops
    for phase in ("decode", "reference", "update"):
        assert two[phase].tokens > one[phase].tokens and two[phase].flops > one[phase].flops


@given(STEPS)
def test_one_response_without_reflections_costs_both_layouts_the_same(s: StepShapes) -> None:
    s = s._replace(responses=1, questions={})
    ours, theirs = phase_costs(TINY, s, old=True), layout_costs(TINY, s, "release")

    def roll_out(costs: dict[str, Cost]) -> Cost:
        return costs["vision"] + costs["prefill"] + costs["decode"]

    assert roll_out(ours) == roll_out(theirs)
    # The release also reads the last token and computes the logits of the prompt.
    last = decoder_flops(TINY, 1, before=s.prompt_tokens + s.response_tokens - 1)
    more = (last + Cost(linear=logits_flops(TINY, s.prompt_tokens))).times(s.prompts)
    for phase in ("old", "reference"):
        assert ours[phase] + more == theirs[phase]
    difference = dataclasses.replace(ours["update"] + more.times(3), recomputed=0)
    assert difference == dataclasses.replace(theirs["update"], recomputed=0)


@given(STEPS)
def test_the_release_never_costs_less_and_its_engine_only_saves(s: StepShapes) -> None:
    s = s._replace(questions={name: q._replace(replies=1) for name, q in s.questions.items()})
    grouped, usual, spread, least, most = (
        total(layout_costs(TINY, s, layout)) for layout in LAYOUTS
    )
    for field in ("tokens", "vision_passes", "images", "flops", "executed"):
        rising = [getattr(cost, field) for cost in (grouped, least, spread, usual, most)]
        assert rising[0] < rising[1]
        assert all(a <= b * (1 + 1e-12) for a, b in pairwise(rising))


def test_the_release_at_its_shape_costs_so_many_times_as_much() -> None:
    """The figures of docs/results/account.md: P = 1024, G = 8, the 3B, both reflections."""
    config = published("Qwen/Qwen2.5-VL-3B-Instruct").shapes
    ratios = {}
    for t in (256, 150):
        s = StepShapes(
            512,
            8,
            1024,
            t,
            4 * 854,
            870,
            {
                "coherence": QuestionTokens(26, 2 * t // 3, 46, 3),
                "consistency": QuestionTokens(8, t // 3, 24, 2, with_image=True),
            },
        )
        grouped, *others = (total(layout_costs(config, s, layout)) for layout in LAYOUTS)
        ratios[t] = [(x.tokens / grouped.tokens, x.flops / grouped.flops) for x in others]
        passes = [x.vision_passes / grouped.vision_passes for x in others]
        # One pass in the rollout, one in the reference, three in the update: 5. The release: 5 * 8
        # to score, 1 or 8 in the rollout, and 1 to 8 in the reflection.
        met = 8 * (1 - (7 / 8) ** 8)
        passes = [x.vision_passes / grouped.vision_passes for x in others]
        assert passes == pytest.approx([49 / 5, (41 + met) / 5, 42 / 5, 56 / 5])
        # With the reference's images kept from an earlier epoch, 4.
        kept = total(phase_costs(config, s, kept=True)).vision_passes
        passes = [x.vision_passes / kept for x in others]
        assert passes == pytest.approx([49 / 4, (41 + met) / 4, 42 / 4, 56 / 4])
        images = [x.images / grouped.images for x in others]
        assert images == pytest.approx([33 / 3, (25 + met) / 3, 26 / 3, 40 / 3])
    assert np.round(ratios[256], 2).tolist() == [
        [3.55, 4.68],
        [3.41, 4.47],
        [3.2, 4.17],
        [3.95, 5.22],
    ]
    assert np.round(ratios[150], 2).tolist() == [
        [4.49, 5.8],
        [4.29, 5.53],
        [4.0, 5.13],
        [5.04, 6.52],
    ]
    assert ratios[256][0][0] >= 3.5


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ShapeError, match="layout='flat': must be one of grouped, release, "):
        layout_costs(TINY, STEP, "flat")


def test_the_program_prints_both_steps_and_the_ratios() -> None:
    command = [sys.executable, "-m", "benchmarks.data_flow", "--config=configs/qwen_vl.py"]
    command += ["--config.policy.path=Qwen/Qwen2.5-VL-3B-Instruct"]
    done = subprocess.run(
        [*command, "--prompt_tokens=1024", "--response_tokens=256"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| sum \| 9,238,042 \| 2,560 \| 1,536 \|", done.stdout)
    assert re.search(r"\| sum \| 32,829,440 \| 25,088 \| 16,896 \|", done.stdout)
    assert "| release | 3.55 | 9.80 | 11.00 |" in done.stdout
