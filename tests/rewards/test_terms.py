import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax import rewards
from emor3_jax.config import ConfigError, default, reward_term, reward_terms
from emor3_jax.prepare.checks import validate
from emor3_jax.rewards.scorer import _spell
from emor3_jax.rewards.terms import TermError, make_term
from emor3_jax.types import Samples


def test_patterns_are_read_beside_the_rules(straddling, labels):
    terms = (rewards.Term("opened", 0.1, r"^<step1>"), rewards.Term("joyful", 0.1, r"jo+y"))
    scorer = rewards.Scorer(straddling.tokenizer, labels, reward=rewards.Reward(terms=terms))
    tokens, lengths = _spell(straddling.tokenizer, ["<step1> jooy", " <step1>", "\\boxed{joy}"])
    format_, answer, first, second = rewards.score_response(scorer.tables, tokens, lengths)
    assert format_.tolist() == [0, 0, 0] and answer.tolist() == [-1, -1, 0]
    assert first.tolist() == [1, 0, 0] and second.tolist() == [1, 0, 1]


def test_terms_of_a_config():
    config = default()
    assert reward_terms(config) == ()
    config.reward.terms.polite = reward_term(weight=0.3, pattern="please")
    config.reward.terms.own = reward_term(function="jax.numpy:zeros_like")
    own, polite = reward_terms(config)
    assert (polite.name, polite.weight, polite.pattern) == ("polite", 0.3, "please")
    assert own.function.__name__ == "zeros_like" and own.weight == 0.1


@pytest.mark.parametrize(
    ("name", "fields", "rule"),
    [
        ("accuracy", {"pattern": "a"}, "none of overall, format"),
        ("nothing", {}, "exactly one of pattern, function and text"),
        ("two", {"pattern": "a", "text": "math:sqrt"}, "exactly one of"),
        ("wrong", {"pattern": "(a"}, "missing"),
        ("looks", {"pattern": "a(?=b)"}, "no automaton can read"),
        ("gone", {"function": "no_such_module:f"}, "module:name"),
        ("bare", {"text": "math"}, "module:name"),
        ("value", {"text": "math:pi"}, "is not a function"),
    ],
)
def test_a_term_that_cannot_be_used_is_named(name, fields, rule):
    config = default()
    config.reward.terms[name] = reward_term(**fields)
    with pytest.raises(ConfigError, match=rf"config\.reward\.terms\.{name}=.*{rule}"):
        validate(config)


def test_a_term_is_hashable():
    assert hash(make_term("a", 0.1, "x", "", "")) == hash(make_term("a", 0.1, "x", "", ""))


def test_a_group_of_which_a_term_is_no_number_is_left_out(labels, straddling):
    terms = (
        rewards.Term("ratio", 1.0, text=lambda text, label: float("nan" if "b" in text else 1)),
        rewards.Term("size", 0.0, function=lambda group: jnp.zeros(group.lengths.shape)),
    )
    scorer = rewards.Scorer(straddling.tokenizer, labels, reward=rewards.Reward(terms=terms))
    tokens, lengths = _spell(straddling.tokenizer, ["a", "ab", "aa", "a"])
    samples = Samples(
        np.asarray(tokens).reshape(2, 2, -1),
        np.zeros((2, 2, tokens.shape[1]), np.float32),
        np.asarray(lengths).reshape(2, 2),
        np.ones((2, 2), bool),
    )
    texts = scorer._score_texts(jnp.zeros(2, jnp.int32), samples)
    grades = jnp.eye(len(labels))[:2]
    answers = jnp.zeros(2, jnp.int32)
    scores = scorer.reward(scorer.tables, answers, grades, samples, None, texts)
    # The first group is worth nothing; the second has its term.
    assert scores.overall.tolist() == [[0, 0], [1, 1]]
    assert np.isnan(scores.terms["ratio"]).tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("found", [None, "much", (1, 2)])
def test_a_term_that_returns_no_number_is_named(labels, straddling, found):
    terms = (rewards.Term("own", 1.0, text=lambda text, label: found),)
    scorer = rewards.Scorer(straddling.tokenizer, labels, reward=rewards.Reward(terms=terms))
    with pytest.raises(TermError, match=r"reward\.terms\.own: its function returned .* 'ab'"):
        scorer.score_text(["ab"], answers=[labels[0]])
