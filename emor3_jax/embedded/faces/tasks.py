"""QA examples about labelled faces: descriptions by label, and mediocre SET responses.

FER-2013 labels its faces and says nothing else of them, so the descriptions are stock phrases for
each label ("a face with raised brows and a dropped jaw"). They are right for most faces, not for
each. As on EmoScenes, reflections are correct pairs of phrase and label, and SET responses are
mediocre on purpose: they describe the face correctly, now and then as one of another label. The
feeling mostly follows that description, and the answer follows one of the two; else they are one of
a few favourites. The format is often broken.
"""

from collections.abc import Sequence

import numpy as np

from emor3_jax.data.prompts import PromptTemplates, fill
from emor3_jax.embedded.emoscenes.words import reasoning, set_response
from emor3_jax.embedded.tasks import (
    BROKEN_FORMAT,
    FRESH_ANSWER,
    JUDGE_WEIGHT,
    MISNAMED,
    QAExample,
    break_format,
)

LABELS = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")

CAPTION_PREFIX = "a face with"
"""The first words of every description, whatever the face."""

_MOUTHS = {
    "anger": ("pressed lips", "clenched teeth"),
    "disgust": ("a curled lip", "a twisted mouth"),
    "fear": ("a tense open mouth", "stretched lips"),
    "happiness": ("a broad smile", "raised cheeks"),
    "neutral": ("a closed mouth", "relaxed lips"),
    "sadness": ("drooping lips", "a trembling mouth"),
    "surprise": ("a round open mouth", "a dropped jaw"),
}
BROWS = {
    "anger": "lowered brows",
    "disgust": "narrowed eyes",
    "fear": "scared eyes",
    "happiness": "bright eyes",
    "neutral": "calm eyes",
    "sadness": "wet eyes",
    "surprise": "raised brows",
}
"""The caption target of each label: one phrase, each with a first word of its own.

With two phrases, their label's probability would be split between them, and the likeliest of all
phrases could be another label's.
"""
_FEELINGS = {
    "anger": ("threatened and angry", "furious and tense"),
    "disgust": ("disgusted and repelled", "sick and averse"),
    "fear": ("afraid and alarmed", "scared and worried"),
    "happiness": ("happy and warm", "glad and cheerful"),
    "neutral": ("calm and plain", "even and quiet"),
    "sadness": ("sad and sorry", "gloomy and low"),
    "surprise": ("surprised and amazed", "startled and curious"),
}
_AROUSAL = {
    "anger": "negative , high arousal",
    "disgust": "negative , low arousal",
    "fear": "negative , high arousal",
    "happiness": "positive , high arousal",
    "neutral": "neutral , low arousal",
    "sadness": "negative , low arousal",
    "surprise": "positive , high arousal",
}
# The habit: probability of each label whatever the face shows, and of following the description.
# The latter is high, or the policy learns the favourites and never to follow its own steps.
_HABIT = (0.1, 0.05, 0.1, 0.3, 0.2, 0.15, 0.1)
_FOLLOWED = 0.8
# Weight of a response's tokens. Only a few of them depend on the face.
_SET_WEIGHT = 2.0


def describe(label: str, rng: np.random.Generator) -> str:
    """Returns a stock description of a face with a label."""
    return f"{CAPTION_PREFIX} {BROWS[label]} and {rng.choice(_MOUTHS[label])}"


def described(text: str) -> str | None:
    """Returns the label whose brows a text names first, None if it names none."""
    found = [(text.find(brows), label) for label, brows in BROWS.items() if brows in text]
    return min(found)[1] if found else None


def feeling(label: str, rng: np.random.Generator) -> str:
    """Returns a stock sentence for the feeling of a viewer."""
    return f"a viewer would feel {rng.choice(_FEELINGS[label])}"


def habit(seen: str, rng: np.random.Generator) -> str:
    """Draws the label that the base policy names: mostly the described one, else a favourite."""
    return seen if rng.random() < _FOLLOWED else str(rng.choice(LABELS, p=_HABIT))


def face_examples(
    label: str, question: str, templates: PromptTemplates, rng: np.random.Generator
) -> list[QAExample]:
    """Returns an example of each kind about a face, with a true and a false consistency one.

    Args:
      label: of the face, in `LABELS`.
      question: the row's question, as in training.
      templates: the prompt templates of the run.
      rng: NumPy generator.
    """
    other = _another(label, rng)
    true, false = (
        fill(templates.reflections["consistency"], text=f"<step1> {describe(name, rng)} </step1>")
        for name in (label, other)
    )
    told = str(rng.choice(LABELS))
    text = reasoning(describe(told, rng), feeling(told, rng))
    judge = fill(templates.reflections["coherence"], labels=LABELS, text=text)
    asked = fill(templates.set, labels=LABELS, question=question)
    return [
        QAExample("describe", "describe the picture", describe(label, rng), True, 1.0),
        QAExample("consistency", true, "yes", True, JUDGE_WEIGHT),
        QAExample("consistency", false, "no", True, JUDGE_WEIGHT),
        QAExample("coherence", judge, told, False, JUDGE_WEIGHT),
        QAExample("set", asked, response(label, rng), True, _SET_WEIGHT),
    ]


def response(label: str, rng: np.random.Generator) -> str:
    """Returns a SET response as the base policy would give it; see the module's docstring."""
    seen = _another(label, rng) if rng.random() < MISNAMED else label
    felt = habit(seen, rng)
    answer = habit(seen, rng) if rng.random() < FRESH_ANSWER else felt
    text = set_response(describe(seen, rng), feeling(felt, rng), _AROUSAL[felt], answer)
    return break_format(text, answer, rng) if rng.random() < BROKEN_FORMAT else text


def _another(label: str, rng: np.random.Generator) -> str:
    """Returns one of the other labels."""
    return str(rng.choice([name for name in LABELS if name != label]))


def corpus(questions: Sequence[str], templates: PromptTemplates, seed: int = 0) -> list[str]:
    """Returns training texts for the tokenizer.

    Args:
      questions: the different questions of the rows.
      templates: the prompt templates.
      seed: of the drawn phrases.
    """
    rng = np.random.default_rng(seed)
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "yes", "no"] * 8
    for question in questions:
        for label in LABELS:
            for _ in range(40):
                for example in face_examples(label, question, templates, rng):
                    texts += [example.question, example.reply]
    return texts
