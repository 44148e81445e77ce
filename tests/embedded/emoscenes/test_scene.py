import itertools

import numpy as np
import pytest

from emor3_jax.data.labels import LABEL_SETS
from emor3_jax.embedded.emoscenes import scene as scenes
from emor3_jax.embedded.emoscenes.scene import CUES, LAYOUTS, STYLES, Layout, Scene


@pytest.mark.parametrize("style", STYLES)
def test_tables_are_distributions(style):
    for cue in CUES:
        table = scenes.likelihood(style, cue)
        assert table.shape == (len(scenes.labels(style)), len(scenes.values(style, cue)))
        assert (table > 0).all()
        np.testing.assert_allclose(table.sum(axis=1), 1)


def test_labels_are_those_of_the_label_sets():
    assert scenes.labels("drawn") == LABEL_SETS["mikels8"]
    assert scenes.labels("shifted") == LABEL_SETS["emotion6"]


@pytest.mark.parametrize("style", STYLES)
def test_posterior_of_all_cues_is_the_documented_rule(style):
    scene = scenes.sample(style, np.random.default_rng(3))
    evidence = [
        sum(
            np.log(scenes.likelihood(style, cue)[k, scenes.values(style, cue).index(value)])
            for cue, value in scene.cues().items()
        )
        for k in range(len(scenes.labels(style)))
    ]
    sharp = np.exp(scenes.SHARPNESS * np.asarray(evidence))
    np.testing.assert_allclose(scenes.posterior(style, scene.cues()), sharp / sharp.sum())


@pytest.mark.parametrize("style", STYLES)
def test_joint_is_a_distribution_with_balanced_labels(style):
    joint = scenes.joint(style)
    np.testing.assert_allclose(joint.sum(), 1)
    by_label = joint.sum(axis=tuple(range(len(CUES))))
    np.testing.assert_allclose(by_label, 1 / len(scenes.labels(style)), atol=0.006)


@pytest.mark.parametrize("style", STYLES)
def test_all_cues_decide_and_no_single_one_does(style):
    assert 0.88 < scenes.best_accuracy(style) < 0.93
    for cue in CUES:
        assert scenes.best_accuracy(style, [cue]) < (0.5 if style == "drawn" else 0.55), cue
    for pair in itertools.combinations(CUES, 2):
        assert scenes.best_accuracy(style, pair) < 0.7, pair
    # The four large cues leave little to the light and the colours.
    assert scenes.best_accuracy(style, CUES[:4]) > 0.8


def test_samples_follow_the_joint():
    rng = np.random.default_rng(0)
    drawn = [scenes.sample("drawn", rng) for _ in range(4000)]
    names = scenes.labels("drawn")
    hits = [names[scenes.posterior("drawn", s.cues()).argmax()] == s.label for s in drawn]
    assert abs(np.mean(hits) - scenes.best_accuracy("drawn")) < 0.02
    for cue in CUES:
        hits = [
            names[scenes.posterior("drawn", {cue: getattr(s, cue)}).argmax()] == s.label
            for s in drawn
        ]
        assert abs(np.mean(hits) - scenes.best_accuracy("drawn", [cue])) < 0.03, cue


def test_sampling_is_seeded():
    a, b, c = (
        [scenes.sample("shifted", rng) for _ in range(5)]
        for rng in (np.random.default_rng(seed) for seed in (1, 1, 2))
    )
    assert a == b != c


def test_layout_numbers_are_distinct_and_centred():
    layouts = {Layout.from_number(n) for n in range(0, LAYOUTS, 7)}
    assert len(layouts) == len(range(0, LAYOUTS, 7))
    first, last = Layout.from_number(0), Layout.from_number(LAYOUTS - 1)
    assert (first.mirrored, last.mirrored) == (0, 1)
    assert (first.person_x, last.person_x, first.object_y, last.object_y) == (-3, 3, -2, 2)


def test_json_round_trip_and_unknown_values():
    scene = scenes.sample("drawn", np.random.default_rng(5))
    assert Scene.from_json(scene.to_json()) == scene
    broken = scene.to_json().replace(f'"{scene.object}"', '"piano"')
    with pytest.raises(ValueError, match="object 'piano' is not drawn in style 'drawn'"):
        Scene.from_json(broken)
    with pytest.raises(ValueError, match="style 'oil' is unknown"):
        scenes.sample("oil", np.random.default_rng(0))
    with pytest.raises(ValueError, match="cue 'smell' is unknown"):
        scenes.values("drawn", "smell")
