import dataclasses

import numpy as np
import pytest

from emor3_jax.embedded.emoscenes import scene as scenes
from emor3_jax.embedded.emoscenes.draw import draw
from emor3_jax.embedded.emoscenes.scene import CUES, LAYOUTS, STYLES


def _scene(style):
    return dataclasses.replace(scenes.sample(style, np.random.default_rng(2)), layout=LAYOUTS // 4)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("cue", CUES)
def test_every_value_of_a_cue_changes_many_pixels(style, cue):
    images = [
        np.asarray(draw(dataclasses.replace(_scene(style), **{cue: value}), 112), np.int32)
        for value in scenes.values(style, cue)
    ]
    for i, a in enumerate(images):
        for b in images[:i]:
            changed = (np.abs(a - b).max(axis=-1) > 40).sum()
            # At least as many pixels as two patches of 14 x 14 hold.
            assert changed > 2 * 14 * 14


@pytest.mark.parametrize("size", [112, 160, 224])
def test_size_and_mode(size):
    image = draw(_scene("drawn"), size)
    assert image.size == (size, size)
    assert image.mode == "RGB"


def test_label_is_not_drawn():
    scene = _scene("drawn")
    other = dataclasses.replace(scene, label="awe" if scene.label != "awe" else "fear")
    assert draw(scene, 112).tobytes() == draw(other, 112).tobytes()


def test_mirrored_layout_swaps_the_sides():
    scene = dataclasses.replace(_scene("drawn"), layout=6)
    mirrored = dataclasses.replace(scene, layout=7)
    left = np.asarray(draw(scene, 112), np.int32)
    right = np.asarray(draw(mirrored, 112), np.int32)[:, ::-1]
    unlike = np.abs(left - right).max(axis=-1) > 40
    assert unlike.mean() < 0.12
    assert (np.abs(left - right[:, ::-1]).max(axis=-1) > 40).mean() > 0.3


@pytest.mark.parametrize("size", [111, 225])
def test_size_out_of_range(size):
    with pytest.raises(ValueError, match=f"size is {size}"):
        draw(_scene("drawn"), size)
