"""The contents of an EmoScenes image, and the emotion that it evokes.

A scene is a person (expression, action) beside an object under some weather, bright or dark, vivid
or gray. Two styles exist. "drawn" has the eight labels of Mikels and filled shapes; "shifted" has
the six labels of Emotion6, outlines, another palette and other objects: the out-of-domain test.

The rule. `p(value | emotion)` is tabled below for every cue. A scene is drawn for an intended
emotion, chosen uniformly, each cue by itself; so every cue adds evidence,

    evidence(emotion) = sum over the six cues of log p(value of the cue | emotion),

and the label is drawn from softmax(SHARPNESS * evidence): people who look at the finished image
name the emotion that it shows rather than the one that was meant. No cue decides alone: the best
guess from any single cue is right in less than half of the scenes. Nor is the sum certain, because
raters disagree: the best possible accuracy is about 90 % (`best_accuracy` is exact).
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence

import numpy as np

from emor3_jax.data.labels import LABEL_SETS

STYLES = ("drawn", "shifted")
LABEL_SET = {"drawn": "mikels8", "shifted": "emotion6"}

EXPRESSIONS = ("smiling", "startled", "calm", "crying", "angry", "sick")
ACTIONS = ("jumping", "waving", "sitting", "running", "punching")
WEATHERS = ("sun", "rainbow", "rain", "lightning", "snow", "stars")
BRIGHTNESS = ("bright", "dark")
COLORFULNESS = ("vivid", "gray")
OBJECTS = {
    "drawn": ("balloon", "mountain", "flower", "rocket", "fire", "trash", "spider", "grave"),
    "shifted": ("kite", "gift", "bomb", "ghost", "worm", "candle"),
}
CUES = ("expression", "action", "object", "weather", "brightness", "colorfulness")

# How a layout number is read (`Layout`): mirrored, shifts of the three parts, shirt colour.
_LAYOUT_RADIX = (2, 7, 5, 7, 5, 7, 4)
LAYOUTS = int(np.prod(_LAYOUT_RADIX))

# How far raters agree on what an image shows; 1 would keep the intended emotion.
SHARPNESS = 2.5

# For each emotion and cue the typical values; what is left of the 1 is shared by the other values.
_TYPICAL: dict[str, dict[str, dict[str, dict[str, float]]]] = {
    "drawn": {
        "amusement": {
            "expression": {"smiling": 0.58, "startled": 0.12},
            "action": {"waving": 0.62, "jumping": 0.2},
            "object": {"balloon": 0.44, "trash": 0.1},
            "weather": {"sun": 0.58, "rainbow": 0.16},
            "brightness": {"bright": 0.85},
            "colorfulness": {"vivid": 0.85},
        },
        "awe": {
            "expression": {"startled": 0.5, "calm": 0.24},
            "action": {"sitting": 0.46, "waving": 0.24},
            "object": {"mountain": 0.44, "rocket": 0.16},
            "weather": {"stars": 0.5, "rainbow": 0.3},
            "brightness": {"dark": 0.55},
            "colorfulness": {"vivid": 0.7},
        },
        "contentment": {
            "expression": {"calm": 0.52, "smiling": 0.26},
            "action": {"sitting": 0.6, "waving": 0.2},
            "object": {"flower": 0.44, "mountain": 0.14},
            "weather": {"sun": 0.36, "snow": 0.42},
            "brightness": {"bright": 0.8},
            "colorfulness": {"gray": 0.55},
        },
        "excitement": {
            "expression": {"smiling": 0.38, "startled": 0.4},
            "action": {"jumping": 0.68, "running": 0.2},
            "object": {"rocket": 0.44, "balloon": 0.18},
            "weather": {"rainbow": 0.52, "sun": 0.24},
            "brightness": {"bright": 0.8},
            "colorfulness": {"vivid": 0.9},
        },
        "anger": {
            "expression": {"angry": 0.62, "crying": 0.08},
            "action": {"punching": 0.7, "running": 0.1},
            "object": {"fire": 0.44, "trash": 0.18},
            "weather": {"lightning": 0.64, "rain": 0.1},
            "brightness": {"dark": 0.6},
            "colorfulness": {"vivid": 0.75},
        },
        "disgust": {
            "expression": {"sick": 0.58, "angry": 0.18},
            "action": {"running": 0.42, "punching": 0.28},
            "object": {"trash": 0.44, "spider": 0.24},
            "weather": {"rain": 0.54, "snow": 0.14},
            "brightness": {"bright": 0.55},
            "colorfulness": {"gray": 0.85},
        },
        "fear": {
            "expression": {"startled": 0.4, "sick": 0.26},
            "action": {"running": 0.64, "sitting": 0.12},
            "object": {"spider": 0.5, "fire": 0.2},
            "weather": {"stars": 0.46, "lightning": 0.3},
            "brightness": {"dark": 0.9},
            "colorfulness": {"gray": 0.7},
        },
        "sadness": {
            "expression": {"crying": 0.6, "calm": 0.14},
            "action": {"sitting": 0.5, "waving": 0.22},
            "object": {"grave": 0.44, "flower": 0.16},
            "weather": {"rain": 0.5, "snow": 0.26},
            "brightness": {"dark": 0.75},
            "colorfulness": {"gray": 0.9},
        },
    },
    "shifted": {
        "anger": {
            "expression": {"angry": 0.62, "crying": 0.08},
            "action": {"punching": 0.7, "running": 0.1},
            "object": {"bomb": 0.44, "worm": 0.12},
            "weather": {"lightning": 0.6, "rain": 0.12},
            "brightness": {"dark": 0.6},
            "colorfulness": {"vivid": 0.75},
        },
        "disgust": {
            "expression": {"sick": 0.58, "angry": 0.18},
            "action": {"running": 0.42, "punching": 0.28},
            "object": {"worm": 0.44, "ghost": 0.14},
            "weather": {"rain": 0.5, "snow": 0.16},
            "brightness": {"bright": 0.55},
            "colorfulness": {"gray": 0.85},
        },
        "fear": {
            "expression": {"startled": 0.4, "sick": 0.26},
            "action": {"running": 0.62, "sitting": 0.14},
            "object": {"ghost": 0.44, "bomb": 0.18},
            "weather": {"stars": 0.46, "lightning": 0.3},
            "brightness": {"dark": 0.9},
            "colorfulness": {"gray": 0.7},
        },
        "joy": {
            "expression": {"smiling": 0.52, "calm": 0.24},
            "action": {"waving": 0.44, "jumping": 0.36},
            "object": {"kite": 0.44, "gift": 0.18},
            "weather": {"sun": 0.52, "rainbow": 0.2},
            "brightness": {"bright": 0.85},
            "colorfulness": {"vivid": 0.8},
        },
        "sadness": {
            "expression": {"crying": 0.58, "calm": 0.16},
            "action": {"sitting": 0.56, "waving": 0.22},
            "object": {"candle": 0.44, "ghost": 0.1},
            "weather": {"rain": 0.44, "snow": 0.3},
            "brightness": {"dark": 0.75},
            "colorfulness": {"gray": 0.9},
        },
        "surprise": {
            "expression": {"startled": 0.42, "smiling": 0.26},
            "action": {"jumping": 0.54, "running": 0.18},
            "object": {"gift": 0.44, "kite": 0.14},
            "weather": {"rainbow": 0.46, "stars": 0.2},
            "brightness": {"bright": 0.65},
            "colorfulness": {"vivid": 0.85},
        },
    },
}


def labels(style: str) -> tuple[str, ...]:
    """The emotions of a style, in the order of its label set.

    Raises:
      ValueError: the style is none of `STYLES`.
    """
    if style not in LABEL_SET:
        raise ValueError(f"style {style!r} is unknown; EmoScenes draws {', '.join(STYLES)}")
    return LABEL_SETS[LABEL_SET[style]]


def values(style: str, cue: str) -> tuple[str, ...]:
    """The values that a cue can take in a style.

    Raises:
      ValueError: the cue is none of `CUES`.
    """
    table = {
        "expression": EXPRESSIONS,
        "action": ACTIONS,
        "object": OBJECTS[style],
        "weather": WEATHERS,
        "brightness": BRIGHTNESS,
        "colorfulness": COLORFULNESS,
    }
    if cue not in table:
        raise ValueError(f"cue {cue!r} is unknown; a scene has {', '.join(CUES)}")
    return table[cue]


@functools.cache
def likelihood(style: str, cue: str) -> np.ndarray:
    """float64[K, number of values]: p(value | emotion), rows in the order of `labels`."""
    names = values(style, cue)
    rows = []
    for typical in (_TYPICAL[style][label][cue] for label in labels(style)):
        rest = (1.0 - sum(typical.values())) / (len(names) - len(typical))
        rows.append([typical.get(name, rest) for name in names])
    table = np.asarray(rows)
    table.setflags(write=False)
    return table


@dataclasses.dataclass(frozen=True)
class Layout:
    """Positions of things: shifts are in pixels of a 112-pixel image."""

    mirrored: int
    person_x: int
    person_y: int
    object_x: int
    object_y: int
    weather_x: int
    shirt: int

    @classmethod
    def from_number(cls, number: int) -> "Layout":
        """Reads a number in [0, LAYOUTS); different numbers give different layouts."""
        digits = []
        for radix in _LAYOUT_RADIX:
            number, digit = divmod(number, radix)
            digits.append(digit)
        mirrored, *shifts, shirt = digits
        centred = (s - r // 2 for s, r in zip(shifts, _LAYOUT_RADIX[1:6], strict=True))
        return cls(mirrored, *centred, shirt)


@dataclasses.dataclass(frozen=True)
class Scene:
    """One image: its cues, its layout number and the emotion that it was drawn for."""

    style: str
    expression: str
    action: str
    object: str
    weather: str
    brightness: str
    colorfulness: str
    layout: int
    label: str

    @property
    def key(self) -> tuple:
        """Key of the image's contents; two scenes with one key look the same."""
        return dataclasses.astuple(self)[:-1]

    def cues(self) -> dict[str, str]:
        """The six cues by name, in the order of `CUES`."""
        return {cue: getattr(self, cue) for cue in CUES}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """Reads what `to_json` wrote.

        Raises:
          ValueError: the style or a cue has a value that EmoScenes does not know.
        """
        scene = cls(**json.loads(text))
        for cue, value in scene.cues().items():
            if value not in values(scene.style, cue):
                raise ValueError(f"{cue} {value!r} is not drawn in style {scene.style!r}")
        return scene


def sample(style: str, rng: np.random.Generator) -> Scene:
    """Draws a scene by the rule of this module, and a layout.

    Raises:
      ValueError: the style is unknown.
    """
    names = labels(style)
    intended = int(rng.integers(len(names)))
    cues = {}
    for cue in CUES:
        cues[cue] = values(style, cue)[_draw(likelihood(style, cue)[intended], rng)]
    label = names[_draw(posterior(style, cues), rng)]
    return Scene(style, **cues, layout=int(rng.integers(LAYOUTS)), label=label)


def _draw(p: np.ndarray, rng: np.random.Generator) -> int:
    return min(int(np.searchsorted(np.cumsum(p), rng.random())), len(p) - 1)


@functools.cache
def joint(style: str) -> np.ndarray:
    """p(cues, label): one axis per cue in the order of `CUES`, the label last; sums to 1."""
    evidence = np.zeros(1)
    for cue in CUES:
        evidence = evidence[..., None, :] + np.log(likelihood(style, cue).T)
    p_cues = np.exp(evidence).mean(axis=-1, keepdims=True)
    sharp = np.exp(SHARPNESS * (evidence - evidence.max(axis=-1, keepdims=True)))
    table = p_cues * sharp / sharp.sum(axis=-1, keepdims=True)
    table.setflags(write=False)
    return table


def posterior(style: str, cues: Mapping[str, str]) -> np.ndarray:
    """p(label | some cues), in the order of `labels`.

    Args:
      style: one of `STYLES`.
      cues: values by cue name; the cues left out count as not seen.

    Returns:
      float64[K], sums to 1.
    """
    seen = tuple(
        values(style, cue).index(cues[cue]) if cue in cues else slice(None) for cue in CUES
    )
    p = joint(style)[seen]
    p = p.reshape(-1, p.shape[-1]).sum(axis=0)
    return p / p.sum()


def best_accuracy(style: str, cues: Sequence[str] = CUES) -> float:
    """Accuracy of the best possible guess from the given cues, exact, in [0, 1]."""
    unseen = tuple(axis for axis, cue in enumerate(CUES) if cue not in cues)
    return float(joint(style).sum(axis=unseen).max(axis=-1).sum())
