"""Seconds of a step by hand, and what they follow."""

import dataclasses
import math
import statistics

import numpy as np
import pytest
from support import tiny

from emor3_jax.flops import Cost, JudgeShapes, QuestionTokens, StepShapes
from emor3_jax.flops.seconds import (
    CHIPS,
    REASONS,
    AssumptionError,
    Assumptions,
    ChipSpeed,
    Lengths,
    Machine,
    Moved,
    Phase,
    layer_weights,
    phase_seconds,
)
from emor3_jax.models.params import leaves
from emor3_jax.parallel import topology

SHAPES = tiny.make_policy().shapes
STEP = StepShapes(8, 2, 20, 30, 16, 10, {"coherence": QuestionTokens(0, 20, 5, 3)})
COSTS = {
    "vision": Cost(linear=1e6),
    "prefill": Cost(linear=3e6),
    "decode": Cost(linear=5e6, attention=1e6),
    "coherence": Cost(linear=2e6),
    "old": Cost(),
    "reference": Cost(linear=4e6),
    "update": Cost(linear=12e6, recomputed=4e6),
}
# All that is reached is all there is, so that numbers stay plain.
WHOLE = Assumptions(
    20,
    Lengths(30, 0.01, 256),
    padding=0.5,
    lanes=0.5,
    fill=0.5,
    tail=0.25,
    places=2.0,
    chunk=10,
    flops_share=1,
    memory_share=1,
    links_share=1,
)
MACHINE = Machine(ChipSpeed(1e6, 1e5, 1e4), 4, 1, 4, 4, 8, 2, 4, 2)
PARAMETERS = 1000


def test_each_phase_is_the_longest_of_three() -> None:
    found = phase_seconds(SHAPES, STEP, COSTS, MACHINE, WHOLE, PARAMETERS)
    assert list(found) == [
        *("weight sync", "vision and prefill", "decode", "coherence", "reference", "update")
    ]
    # 4 devices of 1e6 FLOP/s; half of the tokens are padding.
    assert found["vision and prefill"].flops == 4e6 / 0.5 / 4e6
    assert found["reference"].flops == 2.0
    # What rematerialisation repeats is executed too.
    assert found["update"].flops == 8.0
    # Four waves, each reading 1000 weights of two bytes.
    assert found["vision and prefill"].memory == pytest.approx(4 * 2000 / 1e5)
    # And three replies' tokens of each wave.
    assert found["coherence"].memory == pytest.approx(4 * 3 * 2000 / 1e5)
    # 250 float32 weights of its own are read, all are written; three quarters come from others.
    assert found["weight sync"].memory == pytest.approx((4 * 250 + 2000) / 1e5)
    assert found["weight sync"].links == pytest.approx(0.75 * 2000 / 1e4)
    # Layers of four micro-batches are gathered once for the reference; for the update twice, and
    # float32 gradients, twice as large, scattered.
    assert found["reference"].links == pytest.approx(4 * 0.75 * 2000 / 1e4)
    assert found["update"].links == pytest.approx(4 * 4 * 0.75 * 2000 / 1e4)
    # 480 response tokens, 960 padded, 240 a device, 24 chunks of 10: each rewrites 80 x 32 float32.
    chunks = 24 * 2 * 4 * 80 * 32
    adam = 2 * 2 * 4 * 4 * 250
    assert found["update"].memory == pytest.approx((4 * 2 * 2000 + chunks + adam) / 1e5)
    assert found["update"].seconds == max(found["update"])
    assert found["update"].sums == 0


def test_a_layer_waits_for_its_sums_over_tensor() -> None:
    args = SHAPES, STEP, COSTS, MACHINE._replace(tensor=2, fsdp=2), WHOLE, PARAMETERS
    found = phase_seconds(*args)
    # Two sums a layer of bfloat16 features; a device receives, twice, the half that it lacks. Half
    # of the 8 prompts of 20 tokens are its own, and as much again is padding.
    each = 2 * SHAPES.num_layers * 2 * SHAPES.hidden_size * (8 * 20 / 0.5) / 2
    assert found["vision and prefill"].sums == pytest.approx(each / 1e4)
    # Prompts and 16 responses of 30 tokens: once by the reference, forward, again and back.
    each *= (8 * 20 + 480) / (8 * 20)
    assert found["reference"].sums == pytest.approx(each / 1e4)
    assert found["update"].sums == pytest.approx(3 * each / 1e4)
    update = found["update"]
    assert update.seconds == max(update.flops, update.memory, update.links) + update.sums


def test_a_judge_has_weights_of_its_own() -> None:
    step = STEP._replace(judge=JudgeShapes("a/b", SHAPES, 12, 16, 12, parameters=500))
    costs = COSTS | {"judge": Cost(linear=1e6)}
    found = phase_seconds(SHAPES, step, costs, MACHINE, WHOLE, PARAMETERS)
    assert list(found)[3:5] == ["judge", "coherence"]
    assert found["judge"].flops == 1e6 / 0.5 / 4e6
    # 1000 bytes for each of four waves; a quarter of them read, and all written, when gathered.
    assert found["judge"].memory == pytest.approx(5.25 * 1000 / 1e5)
    assert found["judge"].links == pytest.approx(0.75 * 1000 / 1e4)
    moved = {"judge.weight_sync": Moved(1e4, 2e4), "judge.prefill": Moved(3e4, 4e4)}
    judged = phase_seconds(SHAPES, step, costs, MACHINE, WHOLE, PARAMETERS, moved)["judge"]
    assert (judged.links, judged.sums) == (4.0, 6.0)
    assert found["coherence"].memory == pytest.approx(4 * 3 * 1000 / 1e5)


def test_decoding_reads_weights_prompts_and_keys_in_every_round() -> None:
    decode = phase_seconds(SHAPES, STEP, COSTS, MACHINE, WHOLE, PARAMETERS)["decode"]
    # 480 tokens on 8 lanes, half of them idle; then a quarter of the longest response.
    rounds = 120 + WHOLE.tail * WHOLE.lengths.most
    token = 2 * 2 * SHAPES.num_layers * SHAPES.num_kv_heads * SHAPES.head_dim
    prompts = 1 * 20 / 0.5
    own = 480 / 4 * WHOLE.lengths.age * 2
    read = rounds * (2000 + prompts * token) + own * token
    assert decode.memory == pytest.approx(read / 1e5)
    assert decode.flops == 6e6 / 0.5 / 4e6
    assert decode.links == decode.sums == 0
    cut = MACHINE._replace(tensor=2, fsdp=2)
    halved = phase_seconds(SHAPES, STEP, COSTS, cut, WHOLE, PARAMETERS)["decode"]
    # Weights and heads are cut by two, but a device has twice the prompts.
    read = rounds * (1000 + 2 * prompts * token / 2) + 2 * own * token / 2
    assert halved.memory == pytest.approx(read / 1e5)
    # Four lanes of a part: in each layer two sums, of which a device receives, twice, the half that
    # it lacks; and half of the logits.
    received = 4 * (2 * SHAPES.num_layers * 2 * SHAPES.hidden_size + 4 * SHAPES.vocab_size / 2)
    waits = 2 * SHAPES.num_layers * WHOLE.latency
    assert halved.sums == pytest.approx(rounds * (received / 1e4 + waits))
    # Of heads that do not go round, two devices read the same.
    shared = MACHINE._replace(tensor=4, fsdp=1)
    shapes = dataclasses.replace(SHAPES, num_kv_heads=2)
    found = phase_seconds(shapes, STEP, COSTS, shared, WHOLE, PARAMETERS)["decode"]
    token = 2 * 2 * shapes.num_layers * shapes.head_dim
    read = rounds * (500 + 4 * prompts * token) + 4 * own * token
    assert found.memory == pytest.approx(read / 1e5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_rollout_reads_a_byte_for_each_weight_of_int8_layers(family: str) -> None:
    policy = tiny.make_policy(family)
    layers = policy.param_shapes()["model"]["layers"]
    kernels = sum(x.size for path, x in leaves(layers) if path.endswith("kernel"))
    assert layer_weights(policy.shapes) == kernels
    args = policy.shapes, STEP, COSTS
    parameters = 2 * kernels
    plain, int8 = (
        phase_seconds(*args, MACHINE._replace(int8=int8), WHOLE, parameters)
        for int8 in (False, True)
    )
    # Half of the weights take half the bytes: 3/4 of before.
    for name in ("vision and prefill", "coherence"):
        assert int8[name].memory == pytest.approx(0.75 * plain[name].memory)
    assert int8["weight sync"].links == pytest.approx(0.75 * plain["weight sync"].links)
    rounds = 120 + WHOLE.tail * WHOLE.lengths.most
    saved = plain["decode"].memory - int8["decode"].memory
    assert saved == pytest.approx(rounds * kernels / 1e5)
    for name in ("reference", "update"):
        assert int8[name] == plain[name]


def test_collectives_of_compiled_programs_replace_the_counted_ones() -> None:
    found = phase_seconds(
        *(SHAPES, STEP, COSTS, MACHINE, WHOLE, PARAMETERS),
        {"update": Moved(5e4, 2e4), "weight_sync": Moved(1e4)},
    )
    assert found["update"].sums == 2.0
    assert (found["update"].links, found["weight sync"].links) == (5.0, 1.0)
    # That of a program that was not compiled is counted.
    counted = phase_seconds(SHAPES, STEP, COSTS, MACHINE, WHOLE, PARAMETERS)
    assert found["reference"].links == counted["reference"].links > 0


def test_lengths_are_log_normal_and_cut() -> None:
    lengths = Lengths(265, 0.01, 2048)
    found = np.asarray(lengths.quantiles(100_000))
    assert np.mean(found == 2048) == pytest.approx(0.01, abs=1e-5)
    logs = np.log(found[found < 2048])
    # Of the whole distribution, which its median and its cut tell.
    mu = math.log(np.median(found))
    sigma = (math.log(2048) - mu) / statistics.NormalDist().inv_cdf(0.99)
    assert math.exp(mu + sigma**2 / 2) == pytest.approx(265, rel=1e-3)
    assert logs.max() < math.log(2048)
    assert lengths.average == pytest.approx(found.mean(), rel=1e-3) and lengths.average < 265
    # A token of a long response attends to more: what lies behind a token drawn at random.
    assert lengths.age == pytest.approx((found * (found + 1) / 2).sum() / found.sum(), rel=1e-2)
    # A run that allows fewer tokens cuts more of the same responses, one that allows more fewer.
    for limit in (1, 64, 4096):
        cut = np.asarray(lengths._replace(limit=limit).quantiles(100_000))
        np.testing.assert_array_equal(np.minimum(cut, 2048), np.minimum(found, limit))
        assert cut.max() == limit
    with pytest.raises(ValueError, match=r"mean=10, cut=0\.01, .* must lie in \[137, 2048\)"):
        Lengths(10, 0.01, 2048).quantiles()
    Lengths(137, 0.01, 2048).quantiles()


def test_assumptions_are_changed_by_name_and_all_have_a_reason() -> None:
    changed = Assumptions().changed("padding=0.13,mean=400,chunk=32")
    assert (changed.padding, changed.chunk, changed.lengths.mean) == (0.13, 32, 400.0)
    assert changed.lanes == Assumptions().lanes and changed.lengths.cut == 0.01
    assert Assumptions().changed("") == Assumptions()
    for wrong in ("paddding=0.5", "padding=much", "padding=0", "lengths=3", "padding"):
        with pytest.raises(AssumptionError, match=f"^assume='{wrong}': must be a positive number"):
            Assumptions().changed(wrong)
    # Shares of a whole, and numbers that no step has.
    for wrong in (
        *("padding=1.5", "links_share=2", "prompt_tokens=inf", "chunk=nan", "chunk=0.4"),
        *("prompt_tokens=1e300", "most=1e300", "latency=1e308", "lanes=1e-320"),
    ):
        with pytest.raises(AssumptionError, match=f"^assume='{wrong}': .*padding, .*at most 1"):
            Assumptions().changed(wrong)
    with pytest.raises(AssumptionError, match="mean is given twice; give it once"):
        Assumptions().changed("mean=400,padding=0.5,mean=300")
    for wrong in ("mean=5000", "cut=0.7", "cut=1e-300", "most=100", "mean=10"):
        with pytest.raises(AssumptionError, match=f"^assume='{wrong}': .*cut"):
            Assumptions().changed(wrong)
    assert set(REASONS) == set(Assumptions._fields)


def test_every_kind_of_device_has_a_speed() -> None:
    assert set(CHIPS) == set(topology.CHIPS)


def test_the_longest_bound_is_named() -> None:
    assert Phase(1.0, 3.0, 2.0).bound == "memory" and Phase(1.0, 3.0, 2.0).seconds == 3.0
    assert Phase(1.0, 3.0, 2.0, 4.0).bound == "sums" and Phase(1.0, 3.0, 2.0, 4.0).seconds == 7.0
