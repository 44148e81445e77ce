"""English for EmoScenes: about a hundred words, lower case, so that nearly every word is one token.

Descriptions name the six cues in one order. Feelings name an emotion by adjectives that belong to
that emotion alone, so a text can be judged without the image.
"""

from collections.abc import Mapping

import numpy as np

from emor3_jax.data.labels import VALENCE_AROUSAL
from emor3_jax.embedded.emoscenes.scene import CUES, STYLES, Scene, labels, values

QUESTION = "which emotion ?"
DESCRIBE_QUESTION = "describe the picture"

_DESCRIPTION = (
    "{expression} person {action} by a {object} under {weather} , {brightness} and {colorfulness}"
)

_FEELING_WORDS: dict[str, tuple[str, ...]] = {
    "amusement": ("playful", "amused", "silly", "funny"),
    "awe": ("humble", "awed", "tiny", "inspired"),
    "contentment": ("peaceful", "content", "cozy", "gentle"),
    "excitement": ("excited", "eager", "wild", "thrilled"),
    "anger": ("furious", "hostile", "mad", "bitter"),
    "disgust": ("disgusted", "nauseous", "dirty", "rotten"),
    "fear": ("afraid", "nervous", "threatened", "tense"),
    "sadness": ("sad", "lonely", "hopeless", "gloomy"),
    "joy": ("joyful", "happy", "cheerful", "glad"),
    "surprise": ("surprised", "shocked", "stunned", "puzzled"),
}
_FEELINGS = (
    "a viewer feels {} and {}",
    "people would feel {} and {}",
    "it feels {} and {}",
)
_VAGUE_FEELINGS = (
    "a viewer feels something",
    "people would feel something",
    "it feels strong",
)


def render(cues: Mapping[str, str]) -> str:
    """A description, 11 words and a comma, of the six cues given by name."""
    return _DESCRIPTION.format(**cues)


def describe(scene: Scene) -> str:
    """The true description of a scene."""
    return render(scene.cues())


def misread(scene: Scene, rng: np.random.Generator, probability: float) -> dict[str, str]:
    """The cues of a scene, each replaced by another value with the given probability."""
    cues = scene.cues()
    for cue in CUES:
        if rng.random() < probability:
            cues[cue] = _other(scene, cue, rng)
    return cues


def false_description(scene: Scene, rng: np.random.Generator) -> str:
    """A description that is wrong in one to three cues, at least one of the four large ones."""
    return render(false_cues(scene, rng))


def false_cues(scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    """One to three wrong cues, at least one of the four large ones; the others right."""
    cues = scene.cues()
    changed = {str(rng.choice(CUES[:4])), *rng.choice(CUES, size=rng.integers(0, 3), replace=False)}
    for cue in sorted(changed):
        cues[cue] = _other(scene, cue, rng)
    return cues


def _other(scene: Scene, cue: str, rng: np.random.Generator) -> str:
    choices = [v for v in values(scene.style, cue) if v != getattr(scene, cue)]
    return choices[rng.integers(len(choices))]


def feeling(label: str, rng: np.random.Generator) -> str:
    """Phrasings of a viewer's feeling: 3 x 12 for each label.

    Raises:
      ValueError: the label belongs to no style of EmoScenes.
    """
    if label not in _FEELING_WORDS:
        raise ValueError(f"no words for the label {label!r}; known are {', '.join(_FEELING_WORDS)}")
    first, second = rng.choice(_FEELING_WORDS[label], size=2, replace=False)
    return _FEELINGS[rng.integers(len(_FEELINGS))].format(first, second)


def vague_feeling(rng: np.random.Generator) -> str:
    """A feeling that names no emotion."""
    return _VAGUE_FEELINGS[rng.integers(len(_VAGUE_FEELINGS))]


def arousal(label: str) -> str:
    """Valence and arousal of a label, such as "positive , low arousal"."""
    valence, arousal_of = VALENCE_AROUSAL[label]
    return f"{valence} , {arousal_of} arousal"


def reasoning(step1: str, step2: str) -> str:
    """The first two steps: the text that the coherence question is about."""
    return f"<step1> {step1} </step1>\n<step2> {step2} </step2>"


def set_response(step1: str, step2: str, step3: str, answer: str) -> str:
    """A whole response in the SET format."""
    return f"{reasoning(step1, step2)}\n<step3> {step3} </step3>\n\\boxed{{{answer}}}"


def vocabulary() -> list[str]:
    """Every phrase of this module once: with it a tokenizer sees each word."""
    phrases = [QUESTION, DESCRIBE_QUESTION, _DESCRIPTION, *_FEELINGS, *_VAGUE_FEELINGS]
    phrases += [f" {word}" for words in _FEELING_WORDS.values() for word in words]
    for style in STYLES:
        phrases += [f" {value}" for cue in CUES for value in values(style, cue)]
        for label in labels(style):
            boxed = set_response("a", "a", arousal(label), label)
            phrases += [label, f" {label}", boxed]
    return phrases
