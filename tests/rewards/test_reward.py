"""The reward: format, reflections that count, custom terms, and the weights of all of them."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.data.prompts import PromptTemplates
from emor3_jax.embedded.emoscenes import tasks
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.rewards import QUESTIONS, Question, Reward, Scorer, Term, TermError
from emor3_jax.rewards.rules import YesNoRule
from emor3_jax.rewards.terms import make_term
from emor3_jax.rollout.reflect import prompt_questions
from emor3_jax.types import Batch, Replies, ReplyProbs, Samples

LABELS = ("joy", "fear")
WHOLE = "<step1> a </step1> <step2> b </step2> <step3> c </step3> \\boxed{joy}"
RESPONSES = (WHOLE, "so \\boxed{joy} then", "\\boxed{fear", "joy")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*tasks.text_corpus(5), *RESPONSES], 600)


def encode(tokenizer, texts) -> Samples:
    """One prompt with these responses."""
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    tokens = np.zeros((1, len(ids), max(map(len, ids))), np.int32)
    for g, response in enumerate(ids):
        tokens[0, g, : len(response)] = response
    lengths = np.asarray([list(map(len, ids))], np.int32)
    return Samples(tokens, np.zeros(tokens.shape, np.float32), lengths, lengths > 0)


def score(tokenizer, reward: Reward, replies: Replies | ReplyProbs | None = None):
    """Scores of four responses to an image of joy."""
    rows = dict.fromkeys(Batch._fields)
    batch = Batch(**{**rows, "answers": np.zeros(1, int), "grades": np.float32([[1, 0]])})
    scorer = Scorer(tokenizer, LABELS, reward=reward)
    return scorer.score(batch, encode(tokenizer, RESPONSES), replies)


@pytest.mark.parametrize(("format", "wanted"), [("set", [1, 0, 0, 0]), ("boxed", [1, 1, 0, 0])])
def test_format_of_steps_or_of_the_box_alone(tokenizer, format, wanted):
    found = score(tokenizer, Reward(format=format))
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
    replies = ReplyProbs(
        {"coherence": labels, "consistency": jnp.full((1, 4, 2), 0.5)},
        dict.fromkeys(QUESTIONS, found),
        dict.fromkeys(QUESTIONS, jnp.ones((1, 4), jnp.int32)),
    )
    scores = score(tokenizer, Reward(profile, reflection=reflection), replies)
    # Both are reported, whichever counts.
    assert scores.reflections["coherence"][0, 0] == 0.25
    assert scores.reflections["consistency"][0, 0] == 0.5
    assert scores.overall[0, 0] == pytest.approx(0.8 + 0.1 + term)


TERMS = (
    Term("brief", -0.2, pattern=r"^.{0,4}$"),
    Term("length", 0.3, function=lambda group: group.lengths / group.lengths.max()),
    Term("letters", 0.05, text=lambda text, label: float(sum(map(str.isalpha, text)))),
)


@pytest.mark.parametrize("terms", [(), TERMS], ids=["plain", "terms"])
@pytest.mark.parametrize("asked", ["sampled", "probable", "none"])
@pytest.mark.parametrize(
    ("profile", "reflection"),
    itertools.product(("paper", "release"), ("both", "coherence", "consistency")),
)
def test_the_weighted_scores_sum_to_the_reward(tokenizer, profile, reflection, asked, terms):
    rng = np.random.default_rng(7)
    found = dict.fromkeys(QUESTIONS, np.asarray([[True, True, False, True]]))
    lengths = dict.fromkeys(QUESTIONS, np.ones((1, 4), np.int32))
    said = {"coherence": ("joy", "none", "joy", "fear"), "consistency": ("yes", "no", "yes", "?")}
    probs = {name: rng.dirichlet((1, 1), (1, 4)).astype(np.float32) for name in QUESTIONS}
    replies = {
        "sampled": Replies({n: encode(tokenizer, x) for n, x in said.items()}, found, lengths),
        "probable": ReplyProbs(probs, found, lengths),
        "none": None,
    }[asked]
    reward = Reward(profile, "label", 0.15, 0.05, terms, reflection=reflection)
    scores = score(tokenizer, reward, replies)
    named, weights = scores.named(), reward.weights(reflect=replies is not None)
    total = sum(weight * np.asarray(named[name]) for name, weight in weights.items())
    np.testing.assert_allclose(scores.overall, total, rtol=1e-6, atol=1e-7)
    # The scores tell the responses apart, or equal sums would say little.
    assert len(np.unique(scores.overall)) > 2
    assert set(weights) >= {"format", "accuracy", *(term.name for term in terms)}


def test_a_third_question_is_one_more_row(tokenizer, tmp_path, monkeypatch):
    third = Question(
        "valence",
        False,
        1,
        lambda labels: YesNoRule(),
        lambda labels: ("yes", "no"),
        lambda reading, target, found, profile: jnp.where(found & (reading == 1), 1.0, 0.0),
        lambda probs, target, found, profile: jnp.where(found, probs[..., 0], 0.0),
    )
    monkeypatch.setitem(QUESTIONS, "valence", third)
    (tmp_path / "valence.txt").write_text("is {text} pleasant ?")
    templates = PromptTemplates.load("tiny", "tiny", "tiny", valence=tmp_path / "valence.txt")
    prompted = prompt_questions(tokenizer, templates, LABELS)
    assert [each.question.name for each in prompted] == ["coherence", "consistency", "valence"]
    assert "is" in tokenizer.decode(prompted[2].head)
    assert "pleasant ?" in tokenizer.decode(prompted[2].tail)

    said = {"coherence": ["joy"] * 4, "consistency": ["no"] * 4, "valence": ["Yes."] * 4}
    for profile, each in (("paper", 0.1 / 3), ("release", 0.1)):
        scorer = Scorer(tokenizer, LABELS, profile)
        assert scorer.reward.weights()["valence"] == pytest.approx(each)
        found = scorer.score_text(
            RESPONSES, ["joy"] * 4, **{f"{name}_replies": texts for name, texts in said.items()}
        )
        # Only the first response has steps.
        assert found["valence"].tolist() == [1, 0, 0, 0]
        assert found["overall"][0] == pytest.approx(0.8 + 0.1 + each + each, rel=1e-6)
        # Its whole weight is that of all three questions.
        alone = Reward(profile, reflection="valence").weights()
        assert alone["valence"] == pytest.approx(3 * each)
    with pytest.raises(ValueError, match="valence"):
        scorer.score_text(RESPONSES, ["joy"] * 4, said["coherence"], said["consistency"])
    with pytest.raises(TermError, match="'valence'"):
        make_term("valence", 1.0, ".", "", "")
