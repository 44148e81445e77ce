"""The box rule against the grader package that the method names."""

import random
import re

import numpy as np
from mathruler.grader import extract_boxed_content

from emor3_jax import rewards
from emor3_jax.embedded.tokenizer import train_tokenizer

LABELS = ("joy", "anger", "sky blue")
PIECES = (
    *(
        "\\boxed{",
        "\\boxed{",
        "{",
        "}",
        "}",
        "joy",
        "Anger",
        "sky blue",
        "sky  blue",
        " ",
        "\u2003",
    ),
    *(
        "\\boxed",
        "\\",
        "\\text{joy}",
        "jo",
        "x",
        "\n",
        "</step3>",
        "\\boxed{joy}",
        "\\boxed{ sky blue }",
    ),
)


def test_boxed_content():
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randrange(9))) for _ in range(20_000)]
    # The grader is given normalised text, so leave out what normalisation would change.
    texts = [text for text in texts if not re.search(r"\s[<>/]|[<>/]\s", text)]
    scorer = rewards.Scorer(train_tokenizer([], 270), LABELS)
    wanted = [extract_boxed_content(text).lower() for text in texts]
    assert len({label for label in wanted if label in LABELS}) == len(LABELS)
    assert sum(label in LABELS for label in wanted) > 1000
    for label in LABELS:
        accuracy = scorer.score_text(texts, [label] * len(texts))["accuracy"]
        np.testing.assert_array_equal(accuracy, [float(label == found) for found in wanted])
