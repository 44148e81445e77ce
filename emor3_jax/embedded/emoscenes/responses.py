"""Responses of a good policy to a scene: right about every cue, in the feeling of its label."""

import zlib

import numpy as np

from emor3_jax.embedded.emoscenes import words
from emor3_jax.embedded.emoscenes.scene import Scene

PHRASINGS = 4
"""Responses to each scene, which differ in the words of the feeling."""


def right_responses(scene: str, row_id: str) -> tuple[str, ...]:
    """Returns SET responses to a scene that name its cues and box its label.

    Args:
      scene: as `Scene.to_json` writes it.
      row_id: draws the words, the same ones at every call.
    """
    found = Scene.from_json(scene)
    rng = np.random.default_rng(zlib.crc32(row_id.encode()))
    seen, tone = words.render(found.cues()), words.arousal(found.label)
    return tuple(
        words.set_response(seen, words.feeling(found.label, rng), tone, found.label)
        for _ in range(PHRASINGS)
    )
