"""`Scorer`: both profiles, both targets, with and without reflection; what it refuses."""

import itertools
import random

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from emor3_jax import rewards
from emor3_jax.rewards.combine import (
    coherence_probability,
    combine,
    consistency_probability,
    graded_accuracy,
)

KEYS = ("format", "accuracy", "coherence", "consistency", "overall")
MODES = list(itertools.product(("paper", "release"), ("label", "answer")))


def expect(oracle, labels, responses, answers, replies, scorer):
    rows = [
        oracle.scores(*row, scorer.reward.profile, scorer.reward.coherence_target)
        for row in zip(responses, answers, itertools.repeat(labels), replies, strict=False)
    ]
    return {key: np.asarray([row[key] for row in rows], np.float32) for key in KEYS}


@pytest.fixture(scope="module", params=MODES, ids="-".join)
def scorer(request, build_scorer):
    return build_scorer(*request.param)


def test_scores_are_the_oracle_s(scorer, straddling, tools, oracle, labels):
    rng = random.Random(21)
    n = tools.rows
    said = {"reply": ["", "none", "None", " joy", "joy.", *labels, *(x.upper() for x in labels)]}
    said["yes_no"] = ["", "yes", "No.", "None", "YES, no", "maybe", "y es", "know"]
    for reflect in (True, False, True):
        responses = [tools.make_text(rng) for _ in range(n)]
        answers = [rng.choice(labels) for _ in range(n)]
        replies = [(rng.choice(said["reply"]), rng.choice(said["yes_no"])) for _ in range(n)]
        # Half the time the label is the boxed one, and the reply is right.
        for i in range(0, n, 2):
            if (boxed := oracle.answer(responses[i], labels)) >= 0:
                answers[i] = labels[boxed]
                replies[i] = (rng.choice([answers[i], replies[i][0]]), replies[i][1])
        wanted = expect(
            oracle, labels, responses, answers, replies if reflect else [None] * n, scorer
        )
        texts = tuple(map(list, zip(*replies, strict=True))) if reflect else (None, None)
        by_text = scorer.score_text(responses, answers, *texts)
        spelled = [
            None
            if column is None
            else tools.pad([straddling.spell(x.encode(), rng) for x in column])
            for column in (responses, *texts)
        ]
        by_tokens = scorer.score_tokens(*spelled[0], answers, *spelled[1:])
        assert set(by_text) == set(by_tokens) == set(KEYS)
        for key in KEYS:
            assert by_text[key].dtype == np.float32
            np.testing.assert_allclose(by_text[key], wanted[key], atol=1e-6, err_msg=key)
            np.testing.assert_array_equal(by_text[key], by_tokens[key], err_msg=key)


GOOD = "<step1>a</step1><step2>b</step2><step3>c</step3>\\boxed{joy}"


@pytest.mark.parametrize(
    ("profile", "response", "replies", "wanted"),
    [
        ("paper", GOOD, ("joy", "yes"), 1.0),
        ("paper", GOOD, ("joy", "no"), 0.95),
        ("paper", GOOD, ("none", "maybe"), 0.9),
        ("paper", GOOD, None, 1.0),
        ("paper", "\\boxed{joy}", ("joy", "yes"), 0.8),
        ("paper", "\\boxed{joy}", None, 0.9),
        ("paper", "x" + GOOD, ("joy", "yes"), 0.9),
        ("release", GOOD, ("joy", "yes"), 1.1),
        ("release", GOOD, ("", "maybe"), 1.0),
        ("release", GOOD, ("anger", "None"), 0.9),
        ("release", GOOD, None, 1.1),
        # No text to judge: "None" stands in, which is 0.5 for coherence and 0 for consistency.
        ("release", "\\boxed{joy}", ("joy", "yes"), 0.85),
        ("release", "", None, 0.2),
    ],
)
def test_rewards_by_hand(build_scorer, profile, response, replies, wanted):
    scorer = build_scorer(profile, "label")
    replies = (None, None) if replies is None else ([replies[0]], [replies[1]])
    assert scorer.score_text([response], ["joy"], *replies)["overall"][0] == pytest.approx(wanted)


def test_the_target_may_be_the_own_answer(build_scorer):
    """Against its own answer, a response is coherent with a wrong box; never without a box."""
    for target, wanted in (("label", [0, 1]), ("answer", [1, 0])):
        scorer = build_scorer("paper", target)
        scores = scorer.score_text(
            [GOOD, GOOD.replace("\\boxed{joy}", "")], ["Anger", "Anger"], ["joy", "anger"], ["", ""]
        )
        assert scores["coherence"].tolist() == wanted
        assert scores["accuracy"].tolist() == [0, 0]


def test_weights():
    reflections = [np.float32([1]), np.float32([0])]
    scores = np.float32([1]), np.float32([0.5]), reflections
    options = {"lambda_reflect": 0.3, "lambda_format": 0.2}
    paper = combine(*scores, profile="paper", **options)
    assert paper[0] == pytest.approx(0.5 * 0.5 + 0.3 * 0.5 + 0.2)
    off = combine(*scores, profile="paper", reflect=False, **options)
    assert off[0] == pytest.approx(0.8 * 0.5 + 0.2)
    release = combine(*scores, profile="release", **options)
    assert release[0] == pytest.approx(0.5 * 0.5 + 0.3 + 0.2)


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ([], "at least one"),
        (["joy", "Joy"], "'Joy' is equal to 'joy'"),
        (["a{b"], "'a{b' contains a brace"),
        (["a}"], "'a}' contains"),
        (["<joy>"], "'<joy>' contains"),
        (["a\\b"], "contains"),
        (["a\ufffd"], "contains"),
        ([""], "single spaces"),
        ([" joy"], "single spaces"),
        (["sky  blue"], "single spaces"),
        (["None"], "'None' is what a missing answer"),
    ],
)
def test_labels_that_are_refused(straddling, labels, named):
    with pytest.raises(rewards.LabelError, match=named):
        rewards.Scorer(straddling.tokenizer, labels)


def test_options_that_are_refused(build_scorer, straddling, labels):
    with pytest.raises(ValueError, match="profile='papers'"):
        rewards.Scorer(straddling.tokenizer, labels, profile="papers")
    with pytest.raises(ValueError, match="coherence_target='box'"):
        rewards.Scorer(straddling.tokenizer, labels, coherence_target="box")
    scorer = build_scorer("paper", "label")
    with pytest.raises(ValueError, match="both kinds of replies"):
        scorer.score_text(["a"], ["joy"], ["joy"])
    with pytest.raises(rewards.LabelError, match="answer 'awe' is not one of joy, anger"):
        scorer.score_text(["a"], ["awe"])
    # A text in the place of a list would be read letter by letter, one row broadcast to many.
    with pytest.raises(rewards.LabelError, match="labels='joy': must be a list"):
        rewards.Scorer(straddling.tokenizer, "joy")
    with pytest.raises(ValueError, match="'joy': must be a list of texts"):
        scorer.score_text("joy", ["joy"])
    with pytest.raises(ValueError, match="answers='joy': must be a list"):
        scorer.score_text(["a"], "joy")
    with pytest.raises(ValueError, match="'responses': 3, 'lengths': 3, 'answers': 1"):
        scorer.score_text(["a", "b", "c"], ["joy"])
    with pytest.raises(ValueError, match="'coherence_replies': 1"):
        scorer.score_text(["a", "b"], ["joy", "joy"], ["joy"], ["yes", "no"])


def test_a_term_that_is_a_function_of_the_text_is_scored(straddling, labels):
    term = rewards.Term("long", 0.5, text=lambda text, label: len(text) + len(label))
    scorer = rewards.Scorer(
        straddling.tokenizer, labels, reward=rewards.Reward(lambda_format=0.0, terms=(term,))
    )
    overall = scorer.score_text(["ab", ""], ["joy", "joy"])["overall"]
    assert overall.tolist() == [0.5 * (2 + 3), 0.5 * 3]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"format": "box"}, "format='box': must be"),
        ({"reflection": "logic"}, "reflection='logic': must be 'both' or one of coherence"),
        ({"lambda_reflect": -0.1}, "lambda_reflect=-0.1"),
        ({"lambda_reflect": 0.7, "lambda_format": 0.4}, "together at most 1"),
        ({"overlong": (8, 0, 1.0)}, "the buffer must be at least 1"),
        ({"terms": (rewards.Term("empty", 1.0),)}, "term 'empty': give exactly one"),
    ],
)
def test_a_reward_that_cannot_be_is_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        rewards.Reward(**fields)


def test_a_tokenizer_that_is_not_byte_level_is_refused(labels):
    words = Tokenizer(models.WordLevel({"joy": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(rewards.TokenizerError, match="decodes by nothing"):
        rewards.Scorer(PreTrainedTokenizerFast(tokenizer_object=words), labels)
    pieces = Tokenizer(models.BPE({"▁a": 0}, []))
    pieces.decoder = decoders.ByteLevel()
    with pytest.raises(rewards.TokenizerError, match="token 0 '▁a' contains '▁'"):
        rewards.Scorer(PreTrainedTokenizerFast(tokenizer_object=pieces), labels)


def test_soft_scores_by_hand():
    labels, target = np.float32([[0.2, 0.5, 0.3]] * 3), np.int32([1, -1, 2])
    replies = np.float32([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]])
    found = np.array([True, True, False])
    coherence = coherence_probability(labels, target, found, "paper")
    consistency = consistency_probability(replies, found, "paper")
    np.testing.assert_allclose(coherence, [0.5, 0, 0])
    np.testing.assert_allclose(consistency, [0.9, 0.4, 0], rtol=1e-6)
    coherence = coherence_probability(labels, target, found, "release")
    consistency = consistency_probability(replies, found, "release")
    np.testing.assert_allclose(coherence, [0.5, 0, 0.5])
    np.testing.assert_allclose(consistency, [0.9, 0.4, 0], rtol=1e-6)


def test_graded_accuracy_by_hand():
    grades = jnp.asarray([[1.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
    answer = jnp.asarray([[0, 1, -1], [0, 2, 2]])
    found = graded_accuracy(answer, grades)
    assert found.tolist() == [[1.0, 0.5, 0.0], [0.0, 1.0, 1.0]]
