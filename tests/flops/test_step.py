"""The cost of a step: by hand, and against all products of the real programs."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from support.tiny_flops import STEP, TINY, policy_of, products, prompt_shapes

from emor3_jax.flops import (
    PHASES,
    Cost,
    JudgeShapes,
    QuestionTokens,
    ShapeError,
    StepShapes,
    mean_judge_shapes,
    mean_shapes,
    phase_costs,
    step_flops,
    total,
)
from emor3_jax.flops.cost import decoder_flops
from emor3_jax.learner.logprobs import LogprobSpec, score_responses
from emor3_jax.models.params import Params
from emor3_jax.models.qwen2_5_vl.shapes import Qwen25VLShapes
from emor3_jax.rl.update import combine, partition
from emor3_jax.rollout.generate import Opening, generate
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.types import Batch, ImagePrefix, Images, Prompt, Samples


def test_the_grouped_step_by_hand() -> None:
    costs = phase_costs(TINY, STEP)
    assert tuple(costs) == (*PHASES[:3], "coherence", "consistency", *PHASES[3:])
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
    without = phase_costs(TINY, STEP, remat=False)["update"]
    assert without == dataclasses.replace(costs["update"], recomputed=9600 + 49152)
    # A frozen tower is passed once, forward: 99,456 and 35,328 are the decoder's.
    frozen = phase_costs(TINY, STEP, frozen_tower=True)["update"]
    linear, attention = 50176 + 3 * 99456, 49152 + 3 * 35328
    assert frozen == Cost(156, 2, 2, linear, attention, 9600 + 52 * 1408 + 35328)
    assert step_flops(TINY, STEP) - step_flops(TINY, STEP, frozen_tower=True) == 2 * 99328


def test_candidate_replies_by_hand() -> None:
    # 4 candidates of 3: 2 tokens of each are read (9+1 and 9+2 pairs), logits of 3 of each.
    question = QuestionTokens(head=3, text=4, tail=2, reply=3, replies=4)
    grouped = phase_costs(TINY, STEP._replace(questions={"coherence": question}))["coherence"]
    assert grouped.tokens == 3 + 6 * (6 + 4 * 2)
    assert grouped.linear == grouped.tokens * 1728 + 6 * 4 * 3 * 320
    assert grouped.attention == 64 * (6 + 6 * (39 + 4 * 21))


def test_phases_that_are_switched_off_cost_nothing() -> None:
    plain = STEP._replace(questions={})
    costs = phase_costs(TINY, plain, reference=False)
    assert tuple(costs) == PHASES and costs["reference"] == Cost()
    assert phase_costs(TINY, STEP, old=True)["old"] == phase_costs(TINY, STEP)["reference"]
    kept = phase_costs(TINY, STEP, kept=True)["reference"]
    assert kept + phase_costs(TINY, STEP)["vision"] == phase_costs(TINY, STEP)["reference"]
    assert step_flops(TINY, STEP) == total(phase_costs(TINY, STEP)).flops


# The products of the real programs, from their jaxprs: exact, in all layers, forward and backward.


def _score(shapes: Qwen25VLShapes, s: StepShapes, remat: bool) -> Callable[[Params], jax.Array]:
    """The scoring pass as a function of the parameters."""
    b, g, t = s.prompts, s.responses, s.response_tokens
    policy = policy_of(shapes).with_compute(remat="layers" if remat else "none")
    abstract = prompt_shapes(b, s.prompt_tokens - 1), policy.layout.abstract_images(b, 1)
    prompt, images = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    rows = jnp.zeros(b, jnp.int32)
    batch = Batch(prompt, rows, rows, images, *[None] * 5)
    samples = Samples(jnp.zeros((b, g, t), jnp.int32), None, jnp.full((b, g), t), None)
    spec = LogprobSpec(temperature=1.0, chunk=1024)
    suppressed = jnp.zeros(shapes.vocab_size, bool)

    def score(params: Params) -> jax.Array:
        return score_responses(policy, params, batch, samples, spec, suppressed).logprobs.sum()

    return score


def test_a_judge_reads_the_prompts_and_questions_by_hand() -> None:
    plain, itself = phase_costs(TINY, STEP), JudgeShapes("reference", TINY, 11, 32, 9)
    costs = phase_costs(TINY, STEP._replace(judge=itself))
    judged = costs.pop("judge")
    assert costs == plain and judged == plain["vision"] + plain["prefill"]
    # Of twice as many layers, with 5 tokens of its own, 4 of them an image of 16 patches.
    deeper = JudgeShapes("a/b", dataclasses.replace(TINY, num_layers=4), 5, 16, 5)
    costs = phase_costs(TINY, STEP._replace(judge=deeper))
    assert tuple(costs)[3:6] == ("judge", "coherence", "consistency")
    # 1 + … + 5 = 15 pairs; 16 keys in a window and in the full layer.
    tower = 16 * 784, 4 * 4 * 16 * (16 + 16)
    pairs = 2 * 15 * 128
    assert costs["judge"] == Cost(10, 2, 2, 2 * (tower[0] + 5 * 3456), 2 * tower[1] + pairs)
    assert costs["coherence"] == Cost(45, 0, 0, 45 * 3456 + 12 * 320, 128 * (6 + 6 * 49))
    # 5 tokens behind 5 shared ones (25 + 15 pairs), 1 token of the reply (11 pairs).
    assert costs["consistency"] == Cost(36, 0, 0, 36 * 3456 + 12 * 320, 6 * 51 * 128)
    assert all(costs[phase] == plain[phase] for phase in PHASES)
    # Where nothing is asked, nothing is read.
    unasked = STEP._replace(judge=deeper, questions={})
    assert phase_costs(TINY, unasked) == phase_costs(TINY, STEP._replace(questions={}))
    with pytest.raises(ShapeError, match=r"judge\.shared_tokens=5: must hold the 8 tokens of 32"):
        phase_costs(TINY, STEP._replace(judge=deeper._replace(patches=32)))


def _masked(config: Qwen25VLShapes, s: StepShapes) -> int:
    """FLOPs of pairs that XLA computes and masks, in one scoring pass."""
    p, t, rows = s.prompt_tokens - 1, s.response_tokens, s.prompts * s.responses
    pairs = s.prompts * p * (p - 1) // 2 + rows * t * (t - 1) // 2
    return 4 * config.num_layers * config.hidden_size * pairs


# One window of 16 patches an image, so that all layers of the tower see the same.
SCORED = STEP._replace(patches=16, shared_tokens=5, response_tokens=7)


def test_the_scoring_pass_has_the_products_that_are_counted() -> None:
    found = products(
        jax.make_jaxpr(_score(TINY, SCORED, False))(policy_of(TINY).param_shapes()).jaxpr
    )
    assert found == phase_costs(TINY, SCORED)["reference"].flops + _masked(TINY, SCORED)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_update_has_the_products_that_are_counted(remat: bool, frozen: bool) -> None:
    score = _score(TINY, SCORED, remat)
    trained, held = partition(
        policy_of(TINY).param_shapes(), lambda path: frozen and path[0].key == "visual"
    )

    def loss(trained: Params, held: Params) -> jax.Array:
        return score(combine(trained, held))

    traced = jax.make_jaxpr(jax.value_and_grad(loss))(trained, held)
    needed, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    # The gradient by the pixels, a product like the patch embedding's, is not computed.
    pixels = 2 * SCORED.prompts * SCORED.patches * TINY.vision.patch_dim * TINY.vision.hidden_size
    costs = phase_costs(TINY, SCORED, remat=remat, frozen_tower=frozen)
    expected = costs["update"].executed - pixels * (not frozen)
    assert products(needed) == expected + (3 + remat) * _masked(TINY, SCORED)


def test_prefill_and_a_decoded_token_have_the_products_that_are_counted() -> None:
    b, g, t, p = 2, 3, 5, STEP.prompt_tokens - 1
    policy, sampling = policy_of(TINY), Sampling(t, 1.0, 1.0, (0,))

    def roll_out(params: Params, prompt: Prompt) -> jax.Array:
        _, prefix = policy.read_prompt(params, prompt, None)
        one = jnp.ones((b, g), jnp.int32)
        opening = Opening(prefix, jnp.ones((b, g, 1), jnp.int32), one, one)
        suppressed = jnp.zeros(TINY.vocab_size, bool)
        return generate(
            policy, params, opening, lambda _: jnp.zeros((b, g)), sampling, suppressed
        ).logprobs

    jaxpr = jax.make_jaxpr(roll_out)(policy.param_shapes(), prompt_shapes(b, p)).jaxpr
    costs = phase_costs(TINY, STEP)
    # The prompts; a token behind them; and a loop, counted once, whose token sees all of the cache.
    once = costs["prefill"] + decoder_flops(TINY, 2, logits=2).times(b * g)
    pairs = b * p * p + b * g * ((p + 1) + (p + t + 1))
    assert products(jaxpr) == once.linear + 64 * pairs
    assert costs["decode"].linear == decoder_flops(TINY, 1, logits=1).linear * b * g * t


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
    found = mean_shapes(batch, np.array([[3, 6, 6], [9, 1, 2]]), STEP.questions)
    assert found == StepShapes(2, 3, 8.5, 4.5, 10.0, 4.5, STEP.questions)
    assert step_flops(TINY, found) > 0
    same = mean_judge_shapes("reference", TINY, batch)
    assert same == JudgeShapes("reference", TINY, 7.5, 10.0, 4.5)
    own = ImagePrefix(
        prompt=Prompt(*[None] * 2, np.arange(8) < np.array([[3], [4]]), None),
        images=Images(None, None, np.ones((2, 1, 8), bool)),
        shared_length=np.array([3, 4]),
        shared_position=None,
    )
    found = mean_judge_shapes("a/b", TINY, batch._replace(judge_prefix=own))
    assert found == JudgeShapes("a/b", TINY, 3.5, 8.0, 3.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": 0}, "responses=0: must be at least 1"),
        ({"response_tokens": 0}, "response_tokens=0: must be at least 1"),
        ({"patches": -4}, "patches=-4: must be 0 or more"),
        ({"shared_tokens": 7}, "shared_tokens=7: must hold the 8 tokens of 32 patches"),
        ({"shared_tokens": 12}, "shared_tokens=12: .* less than prompt_tokens=12"),
        (
            {"questions": {"coherence": QuestionTokens(1, 1, 0, 1)}},
            "coherence=.*: tail, reply and replies",
        ),
    ],
)
def test_shapes_that_no_step_can_have_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ShapeError, match=f"^{message}"):
        phase_costs(TINY, STEP._replace(**change))
