"""HTML and Markdown pages, rendered from the Jinja2 templates in `templates/`."""

import base64
import functools
import html
import io

import jinja2
import PIL.Image

_LARGE, _SIDE = 40_000, 336
"""Bytes of an image that a page holds as it is; pixels of the longer side of a smaller one."""


def render(template: str, **values: object) -> str:
    """Returns a page.

    Args:
      template: file name in `templates/`; values are escaped in `.html.j2` files.
      values: the template's variables.
    """
    return _environment().get_template(template).render(values)


def data_url(encoded: bytes) -> str:
    """Returns a `data:` URL of an encoded PNG or JPEG."""
    kind = "png" if encoded.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def thumbnail(encoded: bytes) -> bytes:
    """Returns an encoded image no larger than a page shows it; a small one as it is."""
    if len(encoded) <= _LARGE:
        return encoded
    try:
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            smaller = image.convert("RGB")
    except (OSError, ValueError):
        return encoded
    smaller.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    smaller.save(out, "JPEG", quality=85)
    return min(encoded, out.getvalue(), key=len)


def _number(value: float | None, spec: str = ".1f", missing: str = "–") -> str:
    return missing if value is None else format(value, spec)


def cell(text: object) -> str:
    """Returns a text as it is written into a table of Markdown: on one line, without any HTML."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    # Quotes end no attribute there, and are read in the text itself too.
    return html.escape(line, quote=False)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("emor3_jax.io"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = _number
    environment.filters["cell"] = cell
    return environment
