"""QA examples about faces: descriptions, responses by habit, judgements."""

import re

import numpy as np
import pytest

from emor3_jax.data.prompts import PromptTemplates
from emor3_jax.embedded.faces import tasks

_RNG = np.random.default_rng(0)
_DESCRIPTIONS = {label: {tasks.describe(label, _RNG) for _ in range(400)} for label in tasks.LABELS}


def named(phrases: str) -> set[str]:
    """Returns the labels whose stock descriptions are like these words."""
    return {label for label, all_of_it in _DESCRIPTIONS.items() if phrases in all_of_it}


def test_stock_descriptions_tell_labels_apart() -> None:
    rng = np.random.default_rng(1)
    for label in tasks.LABELS:
        assert named(tasks.describe(label, rng)) == {label}


def test_what_is_described_is_told_by_the_brows_named_first() -> None:
    rng = np.random.default_rng(4)
    for label in tasks.LABELS:
        assert tasks.described(f"<step1> {tasks.describe(label, rng)} </step1>") == label
    assert tasks.described("wet eyes , then raised brows") == "sadness"
    assert tasks.described("a face with a broad smile") is None


def test_responses_describe_the_face_rightly_and_mostly_answer_as_they_describe() -> None:
    rng = np.random.default_rng(2)
    seen, answered, followed, broken = [], [], [], 0
    for _ in range(4000):
        text = tasks.response("fear", rng)
        (description,) = re.findall(r"a face with [a-z ]+ and [a-z ]+?(?= <| \n|\n|$)", text)[:1]
        (label,) = named(description.strip())
        seen.append(label)
        boxed = re.search(r"boxed\{(\w+)\}", text)
        if boxed:
            answered.append(boxed[1])
            followed.append(boxed[1] == label)
        broken += not re.search(r"^<step1>.*</step1>\n<step2>.*</step2>\n<step3>.*</step3>\n", text)
    # 8 % misnamed, as any of the others. The habit: 80 % as described, else a favourite, of which
    # fear is 10 % and happiness 30 %.
    assert np.mean(np.asarray(seen) == "fear") == pytest.approx(0.92, abs=0.02)
    as_described = 0.8 + 0.2 * (0.92 * 0.1 + 0.08 * 0.9 / 6)
    assert np.mean(followed) == pytest.approx(as_described, abs=0.03)
    fear = 0.8 * 0.92 + 0.2 * 0.1
    assert np.mean(np.asarray(answered) == "fear") == pytest.approx(fear, abs=0.035)
    happiness = 0.8 * 0.08 / 6 + 0.2 * 0.3
    assert np.mean(np.asarray(answered) == "happiness") == pytest.approx(happiness, abs=0.02)
    assert 0.15 < broken / 4000 < 0.35


def test_of_two_descriptions_to_judge_one_is_right() -> None:
    templates = PromptTemplates.load(set="tiny", coherence="tiny", consistency="tiny")
    rng = np.random.default_rng(3)
    for label in tasks.LABELS:
        found = tasks.face_examples(label, "which emotion ?", templates, rng)
        kinds = [example.kind for example in found]
        assert kinds == ["describe", "consistency", "consistency", "coherence", "set"]
        assert named(found[0].reply) == {label}
        true, false = (
            re.search(r"<step1> (.*?) </step1>", example.question)[1] for example in found[1:3]
        )
        assert [example.reply for example in found[1:3]] == ["yes", "no"]
        assert named(true) == {label} and label not in named(false)
        assert found[3].reply in tasks.LABELS and not found[3].with_image
