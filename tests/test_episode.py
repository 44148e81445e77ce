"""What the reward is made of: the format that is asked for, and the reflections that count."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_config

from emor3_jax.data.prompts import PromptTemplates
from emor3_jax.embedded.emoscenes import tasks
from emor3_jax.embedded.tokenizer import special_ids, train_tokenizer
from emor3_jax.episode import Actor
from emor3_jax.types import Batch, ReplyProbs, Samples

LABELS = ("joy", "fear")
WHOLE = "<step1> a </step1> <step2> b </step2> <step3> c </step3> \\boxed{joy}"
RESPONSES = (WHOLE, "so \\boxed{joy} then", "\\boxed{fear", "joy")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*tasks.text_corpus(5), *RESPONSES], 600)


def score(tokenizer, profile: str = "paper", replies: ReplyProbs | None = None, **fields):
    """Scores of four responses to a picture of joy."""
    actor = Actor(
        make_config(vocab_size=len(tokenizer), **special_ids(tokenizer)),
        tokenizer,
        LABELS,
        PromptTemplates.load(set="tiny", coherence="tiny", consistency="tiny"),
        profile=profile,
        coherence_target="label",
        lambda_reflect=0.1,
        lambda_format=0.1,
        reflect_rule=None,
        text_lengths=(8,),
        dtype=jnp.float32,
        **fields,
    )
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in RESPONSES]
    tokens = np.zeros((1, 4, max(map(len, ids))), np.int32)
    for g, response in enumerate(ids):
        tokens[0, g, : len(response)] = response
    lengths = np.asarray([list(map(len, ids))], np.int32)
    samples = Samples(tokens, np.zeros(tokens.shape, np.float32), lengths, lengths > 0)
    rows = dict.fromkeys(Batch._fields)
    batch = Batch(**{**rows, "answers": np.zeros(1, int), "grades": np.float32([[1, 0]])})
    return actor.score(batch, samples, replies)


@pytest.mark.parametrize(("format", "wanted"), [("set", [1, 0, 0, 0]), ("boxed", [1, 1, 0, 0])])
def test_format_of_steps_or_of_the_box_alone(tokenizer, format, wanted):
    found = score(tokenizer, format=format)
    assert found.format[0].tolist() == wanted
    assert found.accuracy[0].tolist() == [1, 1, 0, 0]
    # Without reflection its weight is the accuracy's.
    np.testing.assert_allclose(found.overall[0], 0.9 * found.accuracy[0] + 0.1 * found.format[0])


@pytest.mark.parametrize(
    ("profile", "reflection", "term"),
    [
        # Coherence 0.25 and consistency 0.5, where there is a text to judge.
        ("paper", "both", 0.1 * 0.75 / 2),
        ("paper", "coherence", 0.1 * 0.25),
        ("paper", "consistency", 0.1 * 0.5),
        ("release", "both", 0.1 * 0.75),
        ("release", "coherence", 0.1 * 2 * 0.25),
        ("release", "consistency", 0.1 * 2 * 0.5),
    ],
)
def test_one_reflection_may_have_the_whole_weight(tokenizer, profile, reflection, term):
    labels = jnp.broadcast_to(jnp.float32([0.25, 0.75]), (1, 4, 2))
    found = jnp.asarray([[True, False, False, False]])
    sizes = jnp.ones((1, 4), jnp.int32)
    replies = ReplyProbs(labels, jnp.full((1, 4), 0.5), found, found, sizes, sizes)
    scores = score(tokenizer, profile, replies, reflection=reflection)
    # Both are reported, whichever counts.
    assert scores.coherence[0, 0] == 0.25 and scores.consistency[0, 0] == 0.5
    assert scores.overall[0, 0] == pytest.approx(0.8 + 0.1 + term)
