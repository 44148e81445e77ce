"""Predictions as text, as JSON lines or as a page."""

import io
import json
from collections.abc import Callable, Iterable, Iterator

from emor3_jax.errors import UserError
from emor3_jax.files import printable
from emor3_jax.inference.images import image_bytes
from emor3_jax.inference.predictor import Prediction
from emor3_jax.io import pages
from emor3_jax.models.images import decode

_THUMBNAIL = 336
"""Longest side in pixels of an image in a page."""

Predictions = Iterable[Prediction]


def as_text(predictions: Predictions) -> Iterator[str]:
    """Yields a paragraph for each prediction, for people to read."""
    for each in predictions:
        yield _paragraph(each) + "\n\n"


def as_json_lines(predictions: Predictions) -> Iterator[str]:
    """Yields one JSON object a line, `Prediction.to_json`."""
    for each in predictions:
        yield json.dumps(each.to_json(), ensure_ascii=False) + "\n"


def as_html(predictions: Predictions) -> Iterator[str]:
    """Yields a page whose images are in it, small; all texts in it are escaped."""
    shown = [(each, _thumbnail(each)) for each in predictions]
    yield pages.render("infer.html.j2", title="Predictions", predictions=shown)


FORMATS: dict[str, Callable[[Predictions], Iterator[str]]] = {
    "text": as_text,
    "jsonl": as_json_lines,
    "html": as_html,
}
"""Name of a format → function that writes it."""


def _paragraph(each: Prediction) -> str:
    name = each.image or "image"
    if each.error:
        return printable(f"{name}: cannot be used: {each.error}")
    share = (each.probabilities or {}).get(each.label)
    sure = "" if share is None else f" ({share:.0%})"
    lines = [f"{name}: {each.label or 'none of the labels'}{sure}"]
    lines += [f"  step {i}: {' '.join(text.split())}" for i, text in enumerate(each.steps, 1)]
    if not each.steps:
        lines.append(f"  response: {' '.join(each.response.split())}")
    if each.probabilities:
        ranked = sorted(each.probabilities.items(), key=lambda pair: -pair[1])
        lines.append("  labels: " + ", ".join(f"{name} {p:.0%}" for name, p in ranked))
    reflections = [
        f"{name} {value:.0%}"
        for name, value in (("coherence", each.coherence), ("consistency", each.consistency))
        if value is not None
    ]
    if reflections:
        trust = "" if each.trust is None else f"; trust {each.trust:.0%}"
        lines.append(f"  reflections: {', '.join(reflections)}{trust}")
    if not each.complete:
        lines.append("  the response was cut at its longest length (--max_tokens)")
    return "\n".join(map(printable, lines))


def _thumbnail(each: Prediction) -> str | None:
    """Returns a small JPEG as a URL; None if the image is gone or cannot be used."""
    if each.error or not each.image:
        return None
    try:
        image = decode(image_bytes(each.image)).convert("RGB")
    except UserError:
        return None
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return pages.data_url(out.getvalue())
