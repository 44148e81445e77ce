import re

import numpy as np
import pytest

from emor3_jax.embedded.emoscenes import scene as scenes
from emor3_jax.embedded.emoscenes import words
from emor3_jax.embedded.emoscenes.scene import CUES, STYLES

ALL_LABELS = sorted({label for style in STYLES for label in scenes.labels(style)})


@pytest.mark.parametrize("style", STYLES)
def test_true_descriptions_name_every_cue(style):
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = scenes.sample(style, rng)
        said = words.describe(scene).split()
        assert set(scene.cues().values()) <= set(said)
        assert len(said) == 12


@pytest.mark.parametrize("style", STYLES)
def test_false_descriptions_get_one_to_three_cues_wrong(style):
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = scenes.sample(style, rng)
        cues = words.false_cues(scene, rng)
        wrong = [cue for cue in CUES if cues[cue] != getattr(scene, cue)]
        assert 1 <= len(wrong) <= 3
        assert set(wrong) & set(CUES[:4])
        assert all(cues[cue] in scenes.values(style, cue) for cue in CUES)
        said = set(words.false_description(scene, rng).split())
        assert not set(scene.cues().values()) <= said


def test_misread_rate():
    rng = np.random.default_rng(0)
    scene = scenes.sample("drawn", rng)
    assert words.misread(scene, rng, 0.0) == scene.cues()
    everything = words.misread(scene, rng, 1.0)
    assert all(everything[cue] != getattr(scene, cue) for cue in CUES)
    wrong = [
        words.misread(scene, rng, 0.25)[cue] != getattr(scene, cue)
        for _ in range(400)
        for cue in CUES
    ]
    assert 0.21 < np.mean(wrong) < 0.29


def test_feelings_belong_to_one_label():
    rng = np.random.default_rng(0)
    said = {label: {words.feeling(label, rng) for _ in range(300)} for label in ALL_LABELS}
    shared = {"a", "viewer", "feels", "people", "would", "feel", "it", "and"}
    for label, phrases in said.items():
        assert len(phrases) >= 6
        own = set(" ".join(phrases).split())
        for other, others in said.items():
            common = own & set(" ".join(others).split())
            assert other == label or common <= shared
    with pytest.raises(ValueError, match="no words for the label 'hunger'"):
        words.feeling("hunger", rng)


@pytest.mark.parametrize("label", ALL_LABELS)
def test_arousal(label):
    assert re.fullmatch(r"(positive|negative) , (low|high) arousal", words.arousal(label))


def test_set_response():
    assert words.set_response("a", "b", "c", "joy") == (
        "<step1> a </step1>\n<step2> b </step2>\n<step3> c </step3>\n\\boxed{joy}"
    )


def test_vocabulary_is_small_and_lower_case():
    text = " ".join(words.vocabulary())
    assert text == text.lower()
    assert len(set(re.findall(r"[a-z]+", text))) <= 350
