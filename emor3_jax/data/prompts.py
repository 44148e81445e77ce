"""The questions that a policy is asked: template files, filled in and rendered as a chat.

A template is a text file with placeholders: `set.txt` asks for Structured Emotional Thinking,
`coherence.txt` and `consistency.txt` are the two reflections. What `\\boxed{...}` holds is text.
The image always comes first in the user's turn, so that all questions about it share a prefix.

Deviations, numbered:
 1. The wording is this project's own; the method fixes the questions, not their words.
 2. The release puts the image where `<image>` stands in the row; here it is always first.
 3. The judged text is put between two constant pieces that are tokenised apart from it, so a
    response's own tokens are judged and nothing is decoded.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from emor3_jax.data.errors import DataError
from emor3_jax.files import MAX_TEMPLATE_BYTES, is_file, read_text, show

BUILT_IN = {
    "qwen": Path(__file__).parent / "templates",
    "tiny": Path(__file__).parent.parent / "embedded" / "templates",
}
"""Template folders by name: full sentences for Qwen2.5-VL, few words for the embedded policy."""

SET_STYLES = {
    "think": BUILT_IN["qwen"] / "think.txt",
    "direct": BUILT_IN["qwen"] / "direct.txt",
    "tiny_direct": BUILT_IN["tiny"] / "direct.txt",
    "confidence": BUILT_IN["qwen"] / "confidence.txt",
    "valence_arousal": BUILT_IN["qwen"] / "valence_arousal.txt",
}
"""Other ways to ask for the emotion, for a `set` template.

Think freely first, answer at once, or think in SET's steps and state numbers behind the answer
(docs/evaluation.md).
"""

RELEASE_ORDER = BUILT_IN["qwen"] / "release"
"""Folder of the reflections in the release's order, by the name "release": for coherence the text
stands before the question; for consistency, behind image and question."""

PLAIN_STYLES = frozenset({"think", "direct", "tiny_direct"})
"""Names of `set` templates that ask for no steps.

SET's format and reflection have nothing to read there: a run with one of them needs
`reflect.enabled=false` and `reward.format="boxed"` (docs/data.md).
"""

IMAGE_TOKEN = "<|image_pad|>"
IMAGE_END = "<|vision_end|>"

# Per template: the placeholders it must hold, once each, and those it may hold.
_PLACEHOLDERS = {
    "set": ({"question"}, {"labels"}),
    "coherence": ({"text", "labels"}, set()),
    "consistency": ({"text"}, set()),
}
# Of a question that has no row above.
_FURTHER_QUESTION = {"text"}, {"labels"}
_PLACEHOLDER = re.compile(r"\\boxed\{[^{}]*\}|\{([^{}]*)\}")
# Stands for the judged text while a chat is rendered: characters that no template contains.
_TEXT_MARK = "\ue000\ue001"


@dataclasses.dataclass(frozen=True)
class PromptTemplates:
    """The templates of a run.

    Attributes:
      set: asks for the emotion, holds {question} and, if wanted, {labels}.
      reflections: name of a question about the response → its template. `coherence` asks which of
        {labels} the text {text} is about; `consistency`, whether {text} describes the image.
    """

    set: str
    reflections: dict[str, str]

    @classmethod
    def load(
        cls,
        set: str | Path = "qwen",
        coherence: str | Path = "qwen",
        consistency: str | Path = "qwen",
        **others: str | Path,
    ) -> "PromptTemplates":
        """Reads the templates, each from a file or, by its name, from a built-in one.

        Args:
          set: path, or a name of `BUILT_IN` or `SET_STYLES`.
          coherence, consistency: path, a name of `BUILT_IN`, or "release" (`RELEASE_ORDER`).
          **others: likewise, for each further question.

        Raises:
          DataError: if a file is missing, misses a placeholder, or holds an unknown or second one.
        """
        chosen = {"coherence": coherence, "consistency": consistency, **others}
        return cls(_read("set", set), {kind: _read(kind, x) for kind, x in chosen.items()})

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], where: str) -> "PromptTemplates":
        """Takes the templates as they are.

        Args:
          texts: "set" and the name of each question → template.
          where: names them in errors.

        Raises:
          DataError: as `load`.
        """
        checked = {kind: _check(kind, text, where) for kind, text in texts.items()}
        return cls(checked.pop("set"), checked)


def has_release_order(kind: str) -> bool:
    """Looks for a question's template in the release's order; returns True if there is one."""
    return (RELEASE_ORDER / f"{kind}.txt").is_file()


def fill(template: str, *, question: str = "", labels: Sequence[str] = (), text: str = "") -> str:
    """Returns a template with its placeholders replaced; labels are joined by commas."""
    values = {"question": question, "labels": ", ".join(labels), "text": text}

    def value(match: re.Match[str]) -> str:
        return match[0] if match[1] is None else values[match[1]]

    return _PLACEHOLDER.sub(value, template)


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    question: str,
    labels: Sequence[str],
    n_image_tokens: int,
) -> list[int]:
    """Returns the tokens of a question, up to where the policy's response begins.

    Args:
      tokenizer: with a chat template that knows image content.
      template: a `PromptTemplates.set`, or any text with {question} and {labels}.
      question: what is asked of the image.
      labels: the label set.
      n_image_tokens: tokens that the image takes; 0 asks without an image.

    Raises:
      DataError: if the question contains a special token, such as an image's.
    """
    before, after = _render_set(tokenizer, template, question, tuple(labels), n_image_tokens > 0)
    if not n_image_tokens:
        return list(before)
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return [*before, *[image] * n_image_tokens, *after]


def reflection_parts(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    labels: Sequence[str],
    with_image: bool,
) -> tuple[list[int], list[int]]:
    """Returns the tokens before and after the judged text of a reflection.

    Args:
      tokenizer: as in `render_prompt`.
      template: one of `PromptTemplates.reflections`.
      labels: the label set.
      with_image: True leaves out of the head what the question shares with every prompt about the
        same image: the system turn and the image, `shared_length` tokens. The head may
        then be empty.

    Raises:
      DataError: if the chat template does not render an image or drops the text.
    """
    filled = fill(template, labels=labels, text=_TEXT_MARK)
    head, mark, tail = _chat(tokenizer, filled, with_image).partition(_TEXT_MARK)
    if not mark:
        raise DataError("the tokenizer's chat template drops the text of the user's turn")
    if with_image:
        head = head[head.index(IMAGE_END) + len(IMAGE_END) :]
    return _encode(tokenizer, head), _encode(tokenizer, tail)


def image_parts(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns the tokens before and behind an image that every question about it starts with.

    Args:
      tokenizer: as in `render_prompt`.

    Raises:
      DataError: if the chat template does not render an image.
    """
    head = _chat(tokenizer, _TEXT_MARK, with_image=True).partition(IMAGE_END)[0] + IMAGE_END
    tokens = _encode(tokenizer, head)
    at = tokens.index(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    return tokens[:at], tokens[at + 1 :]


def shared_length(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> int:
    """Returns how many leading tokens of a prompt every question about its image starts with.

    Args:
      tokenizer: the prompt's.
      tokens: int[n], as `render_prompt` returns them, with an image.
    """
    return list(tokens).index(tokenizer.convert_tokens_to_ids(IMAGE_END)) + 1


@functools.lru_cache(maxsize=1024)
def _render_set(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    question: str,
    labels: tuple[str, ...],
    with_image: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the tokens before and after those of the image (all before, without one)."""
    if found := special_token_in(tokenizer, question):
        raise DataError(f"the question {question!r} contains the special token {found}; remove it")
    tokens = tuple(
        _encode(
            tokenizer,
            _chat(tokenizer, fill(template, question=question, labels=labels), with_image),
        )
    )
    if not with_image:
        return tokens, ()
    at = tokens.index(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    return tokens[:at], tokens[at + 1 :]


def special_token_in(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """Returns a special token that `text` spells out, None if there is none.

    Tokens that were added as text, such as `<think>`, are text.
    """
    if "<" not in text:
        return None
    added = tokenizer.added_tokens_decoder.values()
    return next((t.content for t in added if t.special and t.content in text), None)


def opened_tag(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns a tag, such as `<think>`, that the chat template opens before each response."""
    tail = _chat(tokenizer, _TEXT_MARK, with_image=False).partition(_TEXT_MARK)[2]
    found = re.search(r"<[A-Za-z_]\w*>\s*$", tail)
    return found[0].strip() if found else None


def _chat(tokenizer: PreTrainedTokenizerBase, text: str, with_image: bool) -> str:
    content = [{"type": "text", "text": text}]
    if with_image:
        content.insert(0, {"type": "image"})
    turns = [{"role": "user", "content": content}]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # A template may raise whatever Python does where it computes.
        raise DataError(
            f"the tokenizer's chat template fails ({type(error).__name__}: {error}); use the "
            "template that the policy came with"
        ) from error
    if rendered.count(IMAGE_TOKEN) != with_image or rendered.count(IMAGE_END) != with_image:
        raise DataError(
            f"the tokenizer's chat template renders {rendered.count(IMAGE_TOKEN)} {IMAGE_TOKEN} "
            f"for {int(with_image)} image; use the template that the policy came with, and no "
            "special tokens in prompt templates"
        )
    return rendered


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _read(kind: str, source: str | Path) -> str:
    styles = SET_STYLES if kind == "set" else {}
    if has_release_order(kind):
        styles = {"release": RELEASE_ORDER / f"{kind}.txt"}
    built_in = {name: folder / f"{kind}.txt" for name, folder in BUILT_IN.items()} | styles
    path = built_in.get(str(source), Path(source))
    if not is_file(path):
        raise DataError(
            f"template {kind}={show(source)!r}: no such file; give the path of a text file or one "
            f"of {', '.join(built_in)}"
        )
    template = read_text(path, DataError, MAX_TEMPLATE_BYTES).rstrip("\n")
    return _check(kind, template, str(path))


def _check(kind: str, template: str, path: str) -> str:
    """Returns a template; raises DataError if its placeholders are not those of its kind."""
    names = [match[1] for match in _PLACEHOLDER.finditer(template) if match[1] is not None]
    required, optional = _PLACEHOLDERS.get(kind, _FURTHER_QUESTION)
    known = ", ".join(f"{{{name}}}" for name in sorted(required | optional))
    if unknown := [name for name in names if name not in required | optional]:
        raise DataError(
            f"{path}: unknown placeholder {{{show(unknown[0])}}}; a {kind} template knows {known}"
        )
    for name in sorted(required | optional):
        if name in required and name not in names:
            raise DataError(f"{path}: a {kind} template must contain {{{name}}}")
        if names.count(name) > 1:
            raise DataError(f"{path}: a {kind} template may contain {{{name}}} only once")
    return template
