"""Predictions as text, JSON lines and a page."""

import json

from emor3_jax.inference.output import FORMATS
from emor3_jax.inference.predictor import Prediction

FULL = Prediction(
    image="a.png",
    label="joy",
    response="<step1> <b>sun</b> </step1> \\boxed{joy}",
    steps=("<b>sun</b>", "one feels\nglad"),
    complete=False,
    probabilities={"fear": 0.25, "joy": 0.75},
    coherence=0.5,
    consistency=1.0,
)
PLAIN = Prediction(image="b.png", response="none of it", complete=True)
FAILED = Prediction(image="<c>.png", error="it is empty")


def test_text():
    full, plain, failed = FORMATS["text"]([FULL, PLAIN, FAILED])
    assert full == (
        "a.png: joy (75%)\n  step 1: <b>sun</b>\n  step 2: one feels glad\n"
        "  labels: joy 75%, fear 25%\n  reflections: coherence 50%, consistency 100%; trust 75%\n"
        "  the response was cut at its longest length (--max_tokens)\n\n"
    )
    assert plain == "b.png: none of the labels\n  response: none of it\n\n"
    assert failed == "<c>.png: cannot be used: it is empty\n\n"


def test_text_steers_no_terminal():
    hostile = Prediction(image="\x1b[2J\n.png", response="\x9b31m", label="\x07", complete=True)
    (text,) = FORMATS["text"]([hostile])
    assert text == "\\x1b[2J\\n.png: \\x07\n  response: \\x9b31m\n\n"


def test_json_lines():
    full, _, failed = map(json.loads, FORMATS["jsonl"]([FULL, PLAIN, FAILED]))
    assert full["trust"] == 0.75 and full["steps"][1] == "one feels\nglad"
    assert failed == {"image": "<c>.png", "error": "it is empty"}


def test_a_page_escapes_what_it_shows():
    (page,) = FORMATS["html"]([FULL, PLAIN, FAILED])
    assert "&lt;b&gt;sun&lt;/b&gt;" in page and "&lt;c&gt;.png" in page
    assert "<b>sun" not in page and "<c>" not in page
    assert page.index("joy 0.75") < page.index("fear 0.25")
