"""The account of a step: by hand, against XLA's count, against all products of the programs."""

import dataclasses
import importlib
import json
import math
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.interpreters import partial_eval

import emor3_jax
from emor3_jax import account
from emor3_jax.account import LAYOUTS, PHASES, Cost, Question, ShapeError, Shapes, count, total
from emor3_jax.account.cost import decoder_flops, logits_flops, look, read
from emor3_jax.config import ConfigError, default
from emor3_jax.data.prompts import PromptTemplates, render_prompt, shared_length
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.models.qwen2_5_vl.shapes import Config, VisionConfig
from emor3_jax.models.layers import Dense
from emor3_jax.models.qwen2_5_vl.processor import ImageSettings, Processor
from emor3_jax.models.qwen2_5_vl.published import published
from emor3_jax.models.weights import param_shapes
from emor3_jax.rollout.generate import SamplingRule, generate
from emor3_jax.rollout.score import score_responses
from emor3_jax.types import Batch, Images, Prompt

ROOT = Path(emor3_jax.__file__).parents[1]

TINY = Config(
    vision=VisionConfig(
        depth=2,
        hidden_size=4,
        intermediate_size=6,
        num_heads=1,
        patch_size=1,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=4,
        fullatt_block_indexes=(1,),
        out_hidden_size=8,
    ),
    vocab_size=20,
    hidden_size=8,
    intermediate_size=10,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mrope_section=(1, 1, 0),
    tie_word_embeddings=True,
)

# 32 patches are 8 tokens of the prompt.
STEP = Shapes(
    prompts=2,
    responses=3,
    prompt_tokens=12,
    response_tokens=5,
    patches=32,
    shared_tokens=9,
    coherence=Question(head=3, text=4, tail=2, reply=2),
    consistency=Question(head=1, text=2, tail=2, reply=2),
)

# The sums of TINY, used below:
# decoder, a token: q 8*8, k 8*4, v 8*4, o 8*8, three of 8*10: 432 a layer, 864 in all: 1728 FLOPs.
#   Logits of a token: 2*8*20 = 320. A pair of query and key: 2 layers * 4 * 8 = 64.
# tower, a patch: embedding 6*4 = 24; two layers of 4*4*4 + 3*4*6 = 136; merger (16*16 + 16*8) / 4
#   patches = 96: together 392, so 784 FLOPs; a picture 32 * 784 = 25088.
#   Attention: 16 keys in a window, 32 in the full layer: 4*4*32 * (16+32) = 24576 a picture.


def test_the_grouped_step_by_hand() -> None:
    costs = count(TINY, STEP)
    assert tuple(costs) == PHASES
    assert costs["vision"] == Cost(0, 2, 2, 2 * 25088, 2 * 24576)
    # 11 tokens of each prompt; 1 + … + 11 = 66 pairs.
    assert costs["prefill"] == Cost(22, 0, 0, 22 * 1728, 2 * 66 * 64)
    # 6 responses of 5 tokens, which see 11 of the prompt and themselves: 5*11 + 15 = 70 pairs.
    assert costs["decode"] == Cost(30, 0, 0, 30 * (1728 + 320), 6 * 70 * 64)
    # The head of 3 once (6 pairs). 6 questions of 6 more (6*3 + 21 = 39 pairs), then 1 token of the
    # reply (9 + 1 pairs), and logits of its 2.
    assert costs["coherence"] == Cost(45, 0, 0, 45 * 1728 + 12 * 320, 64 * (6 + 6 * 49))
    # 6 questions of 5 behind 9 shared tokens (45 + 15 pairs), 1 token of the reply (15 pairs).
    assert costs["consistency"] == Cost(36, 0, 0, 36 * 1728 + 12 * 320, 6 * 75 * 64)
    assert costs["old"] == Cost()
    # 22 + 30 tokens: 50176 + 38016 + 61440 and 49152 + 8448 + 26880.
    assert costs["reference"] == Cost(52, 2, 2, 149632, 84480)
    # Recomputed: logits 30*320, attention of the tower 49152 twice, its layers without the last
    # product 2*32*448, those of the decoder 52 * 2*2*(192+160), attention of the decoder 35328.
    assert costs["update"] == Cost(156, 2, 6, 3 * 149632, 3 * 84480, 245120)
    without = count(TINY, STEP, remat=False)["update"]
    assert without == dataclasses.replace(costs["update"], recomputed=9600 + 49152)


def test_the_step_of_the_release_by_hand() -> None:
    costs = count(TINY, STEP, "release")
    assert costs["vision"] == Cost(0, 2, 2, 2 * 25088, 2 * 24576)
    # 12 tokens (78 pairs) and the logits of the last one, once for the group.
    assert costs["prefill"] == Cost(24, 0, 0, 2 * (12 * 1728 + 320), 2 * 78 * 64)
    # 4 tokens of each response: 4*12 + 10 pairs.
    assert costs["decode"] == Cost(24, 0, 0, 24 * (1728 + 320), 6 * 58 * 64)
    # 9 tokens (45 pairs), and one of the reply (10 pairs).
    assert costs["coherence"] == Cost(60, 0, 0, 60 * 1728 + 12 * 320, 6 * 55 * 64)
    # 6 pictures; 14 tokens (105 pairs), and one of the reply (15 pairs).
    assert costs["consistency"] == Cost(
        90, 6, 6, 6 * 25088 + 90 * 1728 + 12 * 320, 6 * 24576 + 6 * 120 * 64
    )
    # 6 pictures; 17 tokens, all with logits (153 pairs).
    score = Cost(102, 6, 6, 6 * 25088 + 102 * (1728 + 320), 6 * 24576 + 6 * 153 * 64)
    assert costs["old"] == costs["reference"] == score
    # Recomputed: all layers, 102*1728 and 6*32*2*272, and all attention.
    again = 176256 + 104448 + score.attention
    assert costs["update"] == Cost(306, 6, 18, 3 * score.linear, 3 * score.attention, again)
    assert count(TINY, STEP, "release", remat=False)["update"].recomputed == 0


def test_what_the_engine_of_the_release_may_share_by_hand() -> None:
    usual = count(TINY, STEP, "release")
    least = count(TINY, STEP, "release_cached")
    most = count(TINY, STEP, "release_uncached")
    for phase in ("decode", "old", "reference", "update"):
        assert usual[phase] == least[phase] == most[phase]
    assert least["vision"] == usual["vision"] and least["prefill"] == usual["prefill"]
    assert least["coherence"] == count(TINY, STEP)["coherence"]
    # A picture and 9 tokens (45 pairs) for each prompt, then what the grouped program reads.
    shared = Cost(18, 2, 2, 2 * (25088 + 9 * 1728), 2 * (24576 + 45 * 64))
    assert least["consistency"] == shared + count(TINY, STEP)["consistency"]
    # 3 questions fall into 8 * (1 - (7/8)**3) = 8 * 169/512 = 2.640625 of 8 engines on average; all
    # 6 heads may be in different ones.
    spread = count(TINY, STEP, "release_spread")
    expected = shared.times(2.640625) + count(TINY, STEP)["consistency"]
    assert spread == usual | {"consistency": expected}
    wide = count(TINY, STEP._replace(prompts=4), "release_spread")["coherence"]
    assert wide.tokens == 8 * 3 + 12 * 7
    assert most["vision"] == usual["vision"].times(3)
    assert most["prefill"] == usual["prefill"].times(3)
    assert most["coherence"] == usual["coherence"] and most["consistency"] == usual["consistency"]


def test_candidate_replies_by_hand() -> None:
    # 4 candidates of 3: 2 tokens of each are read (9+1 and 9+2 pairs), logits of 3 of each.
    question = Question(head=3, text=4, tail=2, reply=3, replies=4)
    sampled = question._replace(replies=1)
    grouped = count(TINY, STEP._replace(coherence=question))["coherence"]
    assert grouped.tokens == 3 + 6 * (6 + 4 * 2)
    assert grouped.linear == grouped.tokens * 1728 + 6 * 4 * 3 * 320
    assert grouped.attention == 64 * (6 + 6 * (39 + 4 * 21))
    flat = [
        count(TINY, STEP._replace(coherence=q), "release")["coherence"] for q in (question, sampled)
    ]
    assert flat[0] == flat[1]


def test_phases_that_are_switched_off_cost_nothing() -> None:
    plain = STEP._replace(coherence=None, consistency=None)
    for layout in LAYOUTS:
        costs = count(TINY, plain, layout, reference=False)
        assert costs["coherence"] == costs["consistency"] == costs["reference"] == Cost()
    assert count(TINY, STEP, old=True)["old"] == count(TINY, STEP)["reference"]
    kept = count(TINY, STEP, kept=True)["reference"]
    assert kept + count(TINY, STEP)["vision"] == count(TINY, STEP)["reference"]
    assert account.step_flops(TINY, STEP) == total(count(TINY, STEP)).flops


# XLA counts the body of a loop once: one layer at a time. It counts elementwise work too, which is
# little at these widths. Its causal products are full rectangles.

WIDE = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(
        TINY.vision,
        depth=1,
        hidden_size=128,
        intermediate_size=256,
        num_heads=2,
        patch_size=8,
        window_size=64,
        fullatt_block_indexes=(0,),
        out_hidden_size=256,
    ),
    vocab_size=2000,
    hidden_size=256,
    intermediate_size=768,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mrope_section=(8, 12, 12),
)


def _array(*shape: int, dtype: type = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _prompt(b: int, p: int) -> Prompt:
    ints = {"dtype": jnp.int32}
    return Prompt(
        _array(b, p, **ints),
        _array(b, p, 3, **ints),
        _array(b, p, dtype=bool),
        _array(b, p, **ints),
    )


def _images(config: Config, b: int, windows: int = 1) -> Images:
    shape = (b, windows, config.vision.window_patches)
    return Images(
        _array(*shape, config.vision.patch_dim),
        _array(*shape, 2, dtype=jnp.int32),
        _array(*shape, dtype=bool),
    )


def _xla(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_a_dense_layer_and_the_logits_cost_what_xla_counts() -> None:
    layer, x = Dense(96, use_bias=False), _array(24, 64)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert _xla(layer.apply, params, x) == 2 * 24 * 64 * 96
    logits = _xla(lambda p, x: model.logits(WIDE, p, x), param_shapes(WIDE), _array(96, 256))
    assert logits == logits_flops(WIDE, 96)


def test_a_layer_of_the_decoder_costs_what_xla_counts() -> None:
    b, p = 2, 64
    found = _xla(
        lambda params, prompt: model.forward_prompt(WIDE, params, prompt, None),
        param_shapes(WIDE),
        _prompt(b, p),
    )
    rectangle = 4 * 4 * 64 * b * p * p
    assert found == pytest.approx(decoder_flops(WIDE, b * p) + rectangle, rel=0.01)
    triangle = read(WIDE, p).times(b).attention
    assert triangle == rectangle * (p + 1) / (2 * p)


def test_a_layer_of_the_tower_costs_what_xla_counts() -> None:
    found = _xla(
        lambda params, images: model.encode_images(WIDE, params, images),
        param_shapes(WIDE),
        _images(WIDE, 2),
    )
    expected = look(WIDE, WIDE.vision.window_patches).times(2)
    assert found == pytest.approx(expected.flops, rel=0.03)


# The products of the real programs, from their jaxprs: exact, in all layers, forward and backward.


def _products(jaxpr: jax.extend.core.Jaxpr) -> int:
    """FLOPs of all products, those in a loop as often as it turns; of branches the costliest."""
    flops = 0
    for each in jaxpr.eqns:
        if each.primitive.name == "dot_general":
            (contracted, _), _ = each.params["dimension_numbers"]
            left, out = each.invars[0].aval.shape, each.outvars[0].aval.shape
            flops += 2 * math.prod(out) * math.prod(left[i] for i in contracted)
        elif each.primitive.name == "cond":
            flops += max(_products(branch.jaxpr) for branch in each.params["branches"])
        else:
            turns = each.params["length"] if each.primitive.name == "scan" else 1
            for inner in jax.tree.leaves(list(each.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    flops += turns * _products(getattr(inner, "jaxpr", inner))
    return flops


def _is_jaxpr(x: object) -> bool:
    return isinstance(x, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


def _score(config: Config, s: Shapes, remat: bool):
    """The scoring pass as a function of the parameters."""
    b, g, t = s.prompts, s.responses, s.response_tokens
    prompt, images = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), (_prompt(b, s.prompt_tokens - 1), _images(config, b))
    )

    def score(params: dict) -> jax.Array:
        return score_responses(
            config,
            params,
            prompt,
            images,
            jnp.zeros(b, jnp.int32),
            jnp.zeros(b, jnp.int32),
            jnp.zeros((b, g, t), jnp.int32),
            jnp.full((b, g), t),
            banned=jnp.zeros(config.vocab_size, bool),
            temperature=1.0,
            remat="layers" if remat else "none",
        ).logprobs.sum()

    return score


def _masked(config: Config, s: Shapes) -> int:
    """FLOPs of pairs that XLA computes and masks, in one scoring pass."""
    p, t, rows = s.prompt_tokens - 1, s.response_tokens, s.prompts * s.responses
    pairs = s.prompts * p * (p - 1) // 2 + rows * t * (t - 1) // 2
    return 4 * config.num_layers * config.hidden_size * pairs


# One window of 16 patches a picture, so that all layers of the tower see the same.
SCORED = STEP._replace(patches=16, shared_tokens=5, response_tokens=7)


def test_the_scoring_pass_has_the_products_of_the_account() -> None:
    found = _products(jax.make_jaxpr(_score(TINY, SCORED, False))(param_shapes(TINY)).jaxpr)
    assert found == count(TINY, SCORED)["reference"].flops + _masked(TINY, SCORED)


@pytest.mark.parametrize("remat", [False, True])
def test_the_update_has_the_products_of_the_account(remat: bool) -> None:
    traced = jax.make_jaxpr(jax.value_and_grad(_score(TINY, SCORED, remat)))(param_shapes(TINY))
    needed, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    # The gradient by the pixels, a product like the patch embedding's, is not computed.
    pixels = 2 * SCORED.prompts * SCORED.patches * TINY.vision.patch_dim * TINY.vision.hidden_size
    expected = count(TINY, SCORED, remat=remat)["update"].executed - pixels
    assert _products(needed) == expected + (3 + remat) * _masked(TINY, SCORED)


def test_prefill_and_a_decoded_token_have_the_products_of_the_account() -> None:
    b, g, t, p = 2, 3, 5, STEP.prompt_tokens - 1
    rule = SamplingRule(t, 1.0, 1.0, (0,))

    def roll_out(params: dict, prompt: Prompt) -> jax.Array:
        _, prefix = model.forward_prompt(TINY, params, prompt, None)
        start = jnp.ones((b, g, 1), jnp.int32)
        one = jnp.ones((b, g), jnp.int32)
        banned = jnp.zeros(TINY.vocab_size, bool)
        return generate(
            TINY, params, prefix, start, one, one, lambda _: jnp.zeros((b, g)), rule, banned=banned
        ).logprobs

    jaxpr = jax.make_jaxpr(roll_out)(param_shapes(TINY), _prompt(b, p)).jaxpr
    costs = count(TINY, STEP)
    # The prompts; a token behind them; and a loop, counted once, whose token sees all of the cache.
    once = costs["prefill"] + read(TINY, 2, logits=2).times(b * g)
    pairs = b * p * p + b * g * ((p + 1) + (p + t + 1))
    assert _products(jaxpr) == once.linear + 64 * pairs
    assert costs["decode"].linear == read(TINY, 1, logits=1).linear * b * g * t


# The fourth has an expected value in it.
EXACT = st.sampled_from([layout for layout in LAYOUTS if layout != "release_spread"])
STEPS = st.builds(
    lambda b, g, picture, around, t, coherence, consistency: Shapes(
        b, g, picture + around + 2, t, 4 * picture, picture + 1, coherence, consistency
    ),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(0, 30),
    st.integers(1, 50),
    *[
        st.none()
        | st.builds(
            Question,
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
def test_costs_are_whole_numbers_and_linear_in_prompts(s: Shapes, layout: str) -> None:
    one, two, three = (
        total(count(TINY, s._replace(prompts=s.prompts * n), layout)) for n in (1, 2, 3)
    )
    assert all(isinstance(value, int) for value in dataclasses.astuple(one))
    # What is done once a batch, the head of the coherence question, does not grow.
    assert one + three == two.times(2)
    if s.coherence is None:
        assert two == one.times(2)


@given(STEPS, st.sampled_from(LAYOUTS))
def test_a_longer_response_costs_more(s: Shapes, layout: str) -> None:
    one, two = (
        count(TINY, s._replace(response_tokens=s.response_tokens + n), layout) for n in (0, 1)
    )
    for phase in PHASES:
        assert two[phase].flops >= one[phase].flops
    for phase in ("decode", "reference", "update"):
        assert two[phase].tokens > one[phase].tokens and two[phase].flops > one[phase].flops


@given(STEPS)
def test_one_response_without_reflections_costs_both_layouts_the_same(s: Shapes) -> None:
    s = s._replace(responses=1, coherence=None, consistency=None)
    ours, theirs = count(TINY, s, old=True), count(TINY, s, "release")

    def roll_out(costs: dict[str, Cost]) -> Cost:
        return costs["vision"] + costs["prefill"] + costs["decode"]

    assert roll_out(ours) == roll_out(theirs)
    # The release also reads the last token and computes the logits of the prompt.
    last = read(TINY, 1, before=s.prompt_tokens + s.response_tokens - 1)
    more = (last + Cost(linear=logits_flops(TINY, s.prompt_tokens))).times(s.prompts)
    for phase in ("old", "reference"):
        assert ours[phase] + more == theirs[phase]
    difference = dataclasses.replace(ours["update"] + more.times(3), recomputed=0)
    assert difference == dataclasses.replace(theirs["update"], recomputed=0)


@given(STEPS)
def test_the_release_never_costs_less_and_its_engine_only_saves(s: Shapes) -> None:
    s = s._replace(coherence=s.coherence and s.coherence._replace(replies=1))
    s = s._replace(consistency=s.consistency and s.consistency._replace(replies=1))
    grouped, usual, spread, least, most = (total(count(TINY, s, layout)) for layout in LAYOUTS)
    for field in ("tokens", "vision_passes", "images", "flops", "executed"):
        rising = [getattr(cost, field) for cost in (grouped, least, spread, usual, most)]
        assert rising[0] < rising[1]
        assert all(a <= b * (1 + 1e-12) for a, b in pairwise(rising))


def test_a_token_of_the_3b_costs_two_flops_a_parameter() -> None:
    config = published("3B")
    shapes = param_shapes(config)
    # Tied: the embedding is the head. Biases and norms are no products.
    parameters = sum(x.size for x in jax.tree.leaves(shapes["model"]))
    token = read(config, 1, logits=1).linear
    assert token <= 2 * parameters
    assert token == pytest.approx(2 * parameters, rel=1e-3)
    # A patch passes through all of the tower, but through a quarter of a row of the merger.
    merger = sum(x.size for x in jax.tree.leaves(shapes["visual"]["merger"]))
    tower = sum(x.size for x in jax.tree.leaves(shapes["visual"])) - merger
    assert look(config, 1).linear == pytest.approx(2 * (tower + merger / 4), rel=1e-3)


def test_the_release_at_its_shape_costs_so_many_times_as_much() -> None:
    """The figures of docs/results/account.md: P = 1024, G = 8, the 3B, both reflections."""
    config = published("3B")
    ratios = {}
    for t in (256, 150):
        s = Shapes(
            512,
            8,
            1024,
            t,
            4 * 854,
            870,
            Question(26, 2 * t // 3, 46, 3),
            Question(8, t // 3, 24, 2),
        )
        grouped, *others = (total(count(config, s, layout)) for layout in LAYOUTS)
        ratios[t] = [(x.tokens / grouped.tokens, x.flops / grouped.flops) for x in others]
        passes = [x.vision_passes / grouped.vision_passes for x in others]
        # One pass in the rollout, one in the reference, three in the update: 5. The release: 5 * 8
        # to score, 1 or 8 in the rollout, and 1 to 8 in the reflection.
        met = 8 * (1 - (7 / 8) ** 8)
        passes = [x.vision_passes / grouped.vision_passes for x in others]
        assert passes == pytest.approx([49 / 5, (41 + met) / 5, 42 / 5, 56 / 5])
        # With the reference's pictures kept from an earlier epoch, 4.
        kept = total(count(config, s, kept=True)).vision_passes
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


def test_shapes_of_a_step_are_its_means() -> None:
    batch = Batch(
        prompt=Prompt(*[None] * 2, np.arange(12) < np.array([[9], [6]]), None),
        last_token=None,
        next_position=None,
        images=Images(
            None, None, np.arange(16).reshape(1, 1, 16) < np.array([8, 12])[:, None, None]
        ),
        shared_length=np.array([4, 5]),
        shared_position=None,
        answers=None,
        grades=None,
        weight=None,
    )
    found = account.shapes_of(batch, np.array([[3, 6, 6], [9, 1, 2]]), STEP.coherence)
    assert found == Shapes(2, 3, 8.5, 4.5, 10.0, 4.5, STEP.coherence, None)
    assert account.step_flops(TINY, found) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": 0}, "responses=0: must be at least 1"),
        ({"response_tokens": 0}, "response_tokens=0: must be at least 1"),
        ({"patches": -4}, "patches=-4: must be 0 or more"),
        ({"shared_tokens": 7}, "shared_tokens=7: must hold the 8 tokens of 32 patches"),
        ({"shared_tokens": 12}, "shared_tokens=12: .* less than prompt_tokens=12"),
        ({"coherence": Question(1, 1, 0, 1)}, "coherence=.*: tail, reply and replies"),
    ],
)
def test_shapes_that_no_step_can_have_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ShapeError, match=f"^{message}"):
        count(TINY, STEP._replace(**change))


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ShapeError, match="layout='flat': must be one of grouped, release, "):
        count(TINY, STEP, "flat")


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
    ],
)
def test_known_accelerators_have_their_peak(kind: str, tera: float) -> None:
    assert account.peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "TPU v3", "TPU v4 lite", "NVIDIA GeForce RTX 4090"])
def test_unknown_devices_have_no_utilisation(kind: str) -> None:
    assert account.peak_flops(kind) is None
    assert account.throughput(3e12, 2.0, kind, 1) == {"throughput/tflops_per_s": 1.5}


def test_utilisation_is_the_share_of_all_devices() -> None:
    # 550e12 in 4 s on two devices of 275e12 FLOP/s.
    assert account.throughput(550e12, 4.0, "TPU v4", 2) == {
        "throughput/tflops_per_s": 137.5,
        "throughput/mfu": 0.25,
    }


program = importlib.import_module("emor3_jax.account.__main__")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with a tokenizer, but without weights."""
    path = tmp_path_factory.mktemp("policy")
    tokenizer = train_tokenizer(["which emotion ? yes or no: awe, fear"] * 4, 300)
    Processor(tokenizer, ImageSettings()).save(path)
    config = dataclasses.replace(TINY, vocab_size=len(tokenizer))
    (path / "config.json").write_text(json.dumps(config.to_hf()))
    return path


def test_the_program_counts_the_texts_of_the_config(folder: Path) -> None:
    config = default()
    config.policy.path = str(folder)
    config.data.train.labels = "awe, fear"
    policy, texts = program.find_policy(config)
    shapes = program.make_shapes(config, policy, texts, prompt_tokens=600, response_tokens=90)
    tokenizer = Processor.from_folder(folder).tokenizer
    picture = shapes.patches // 4
    prompt = render_prompt(
        tokenizer, PromptTemplates.load().set, program.QUESTION, ("awe", "fear"), picture
    )
    assert shapes.prompt_tokens == len(prompt) == 600
    assert shapes.shared_tokens == shared_length(tokenizer, prompt)
    assert shapes.response_tokens == 90
    assert (shapes.coherence.text, shapes.consistency.text) == (60, 30)
    assert shapes.coherence.tail > 1 and shapes.consistency.head > 1
    config.reflect.soft = True
    soft = program.make_shapes(config, policy, texts, 600, 90)
    assert (soft.coherence.replies, soft.consistency.replies) == (4, 4)
    config.reflect.enabled = False
    plain = program.make_shapes(config, policy, texts, 600, 90)
    assert plain == shapes._replace(coherence=None, consistency=None)


def test_the_program_takes_the_longest_step_of_the_config() -> None:
    config = default()
    config.policy.path = "Qwen/Qwen2.5-VL-7B-Instruct@main"
    policy, texts = program.find_policy(config)
    assert policy == published("7B") and texts is program.QWEN_TEXTS
    config.data.train.kind = "parquet"
    shapes = program.make_shapes(config, policy, texts, None, None)
    assert (shapes.prompts, shapes.prompt_tokens, shapes.response_tokens) == (512, 2048, 2048)
    # A drawn scene of 112 pixels takes 4 x 4 tokens.
    config.data.train.kind = "emoscenes"
    assert program.make_shapes(config, policy, texts, None, None).prompt_tokens == 16 + 154 + 16


def test_the_program_refuses_what_it_cannot_know() -> None:
    config = default()
    config.policy.path = "someone/policy"
    with pytest.raises(ConfigError, match=r"policy\.path='someone/policy': .*Qwen2\.5-VL-3B"):
        program.report(config, None, None)
    config.policy.path = "Qwen/Qwen2.5-VL-3B-Instruct"
    with pytest.raises(ShapeError, match="prompt_tokens=170: the text of a prompt takes 170"):
        program.report(config, 170, None)


def test_the_program_prints_tables() -> None:
    command = [sys.executable, "-m", "emor3_jax.account", "--config=configs/qwen2_5_vl_3b.py"]
    command += ["--config.policy.path=Qwen/Qwen2.5-VL-3B-Instruct"]
    done = subprocess.run(
        [*command, "--prompt_tokens=1024", "--response_tokens=256"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "512 prompts of 1024 tokens, 854 of them a picture of 3416 patches" in done.stdout
    assert re.search(r"\| sum \| 9,238,042 \| 2,560 \| 1,536 \|", done.stdout)
    assert "| release | 3.55 | 9.80 | 11.00 |" in done.stdout
    done = subprocess.run(
        [*command, "--prompt_tokens=9"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "error: prompt_tokens=9: " in done.stderr
