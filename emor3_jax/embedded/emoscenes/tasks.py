"""QA examples about scenes, which pretrain the tiny base policy.

Descriptions, yes-or-no replies to a description and the emotion of a text are correct. SET
responses are mediocre on purpose, like those of a large model before training: `habit` weighs the
cues too weakly against its two favourites; the boxed answer often disagrees with the feeling; the
format is broken in a third of the responses; now and then a cue is misnamed. Correct responses are
thus within reach (the cues are seen, every label has some probability), and left to the reward to
bring out.
"""

import functools

import numpy as np

from emor3_jax.data.prompts import PromptTemplates, fill
from emor3_jax.embedded.emoscenes import scene as scenes
from emor3_jax.embedded.emoscenes import words
from emor3_jax.embedded.emoscenes.scene import Scene
from emor3_jax.embedded.tasks import (
    BROKEN_FORMAT,
    FRESH_ANSWER,
    JUDGE_WEIGHT,
    MISNAMED,
    QAExample,
    break_format,
)

# Chance that a text to judge names no feeling, so that the emotion is inferred from its cues.
VAGUE_FEELING = 0.5

# The habit: least probability of a label, trust in the evidence, log odds of the favourites.
_FLOOR = 0.04
_TRUST = 0.3
_PULL = 4.0
_FAVOURITES = {"drawn": ("excitement", "sadness"), "shifted": ("joy", "sadness")}


def scene_examples(scene: Scene, rng: np.random.Generator) -> list[QAExample]:
    """Returns an example of each kind about a scene, with a true and a false consistency one."""
    true, false = (
        fill(templates().reflections["consistency"], text=f"<step1> {words.render(cues)} </step1>")
        for cues in (scene.cues(), words.false_cues(scene, rng))
    )
    text, label = _text_to_judge(scene, rng)
    judge = fill(templates().reflections["coherence"], labels=scenes.labels(scene.style), text=text)
    return [
        QAExample("describe", words.DESCRIBE_QUESTION, words.describe(scene), True, 1.0),
        QAExample("consistency", true, "yes", True, JUDGE_WEIGHT),
        QAExample("consistency", false, "no", True, JUDGE_WEIGHT),
        QAExample("coherence", judge, label, False, JUDGE_WEIGHT),
        QAExample("set", set_question(scene.style), mediocre_response(scene, rng), True, 1.0),
    ]


def set_question(style: str) -> str:
    """The user turn that asks for a SET response in a style's labels."""
    return fill(templates().set, labels=scenes.labels(style), question=words.QUESTION)


@functools.cache
def templates() -> PromptTemplates:
    """The short templates that the tiny policy is asked with."""
    return PromptTemplates.load(set="tiny", coherence="tiny", consistency="tiny")


def habit(scene: Scene) -> np.ndarray:
    """Probability that the base policy names each label for a scene.

    The habit weighs every cue, but too weakly against its favourites, one pleasant and one
    unpleasant: mostly it names one of these by the valence of the scene. Every label keeps a
    little probability, since reinforcement learning can only strengthen what is sampled at times.

    Returns:
      float64[K] in the order of `labels`, sums to 1, each at least 0.04.
    """
    at = tuple(scenes.values(scene.style, cue).index(v) for cue, v in scene.cues().items())
    return _habits(scene.style)[at]


@functools.cache
def _habits(style: str) -> np.ndarray:
    """The habit for every combination of cues, in the axes of `scenes.joint`."""
    joint = scenes.joint(style)
    names = scenes.labels(style)
    p = (joint / joint.sum(axis=-1, keepdims=True)) ** _TRUST
    p = p * np.exp(_PULL * np.isin(names, _FAVOURITES[style]))
    p = _FLOOR + (1 - _FLOOR * len(names)) * p / p.sum(axis=-1, keepdims=True)
    p.setflags(write=False)
    return p


def habit_accuracy(style: str) -> tuple[float, float]:
    """Accuracy of the habit, exact: of a label sampled from it, and of its likeliest label."""
    joint, p = scenes.joint(style), _habits(style)
    best = np.take_along_axis(joint, p.argmax(axis=-1)[..., None], axis=-1)
    return float((joint * p).sum()), float(best.sum())


def mediocre_response(scene: Scene, rng: np.random.Generator) -> str:
    """A SET response as the base policy would give it; see the module's docstring."""
    names = scenes.labels(scene.style)
    p = habit(scene)
    felt = names[rng.choice(len(names), p=p)]
    answer = names[rng.choice(len(names), p=p)] if rng.random() < FRESH_ANSWER else felt
    step1 = words.render(words.misread(scene, rng, MISNAMED))
    response = words.set_response(step1, words.feeling(felt, rng), words.arousal(felt), answer)
    if rng.random() < BROKEN_FORMAT:
        response = break_format(response, answer, rng)
    return response


def _text_to_judge(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A text of two steps and its emotion: by the feeling it names, else by its cues."""
    names = scenes.labels(scene.style)
    cues = words.misread(scene, rng, MISNAMED)
    if rng.random() < VAGUE_FEELING:
        label = names[scenes.posterior(scene.style, cues).argmax()]
        step2 = words.vague_feeling(rng)
    else:
        label = names[rng.integers(len(names))]
        step2 = words.feeling(label, rng)
    return words.reasoning(words.render(cues), step2), label


def text_corpus(scenes_per_style: int = 400, seed: int = 0) -> list[str]:
    """Texts for the tokenizer to learn from: all words of EmoScenes, questions, replies, chats."""
    rng = np.random.default_rng(seed)
    corpus = words.vocabulary() * 4
    corpus += ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "yes", "no"] * 4
    for style in scenes.STYLES:
        for _ in range(scenes_per_style):
            for example in scene_examples(scenes.sample(style, rng), rng):
                corpus += [example.question, example.reply]
    return corpus
