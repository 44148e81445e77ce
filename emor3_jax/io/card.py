"""The model card of a policy's folder, its README.md."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from emor3_jax.evaluation.records import Evaluation
from emor3_jax.io import pages, report

CARD_FILE = "README.md"

_STEP = re.compile(r"^A [^\n]*trained by emor3_jax[^\n]* to step\n(\d+) of \d+\.", re.MULTILINE)
"""Of the card's own sentence, whatever a name or a base policy says."""

SNIPPET = """\
import inspect

import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from PIL import Image

folder, image = {folder}, Image.open({image}).convert("RGB")
prompt = {prompt}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
turn = {{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": prompt}}]}}
chat = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
size = model.config.vision_config.spatial_merge_size
count = int(pixels["image_grid_thw"].prod()) // size**2
chat = chat.replace("<|image_pad|>", "<|image_pad|>" * count)
inputs = {{**tokenizer(chat, return_tensors="pt", add_special_tokens=False), **pixels}}
if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
    # Without these, transformers 5 takes positions of text alone, and the answers are others.
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
with torch.no_grad():
    tokens = model.generate(**inputs, max_new_tokens={max_tokens}, do_sample=False)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
"""Asks a policy by transformers alone."""


class DescribedSet(NamedTuple):
    """A data set in a card: its name in the config, kind, split, labels, and number of rows."""

    name: str
    kind: str
    split: str
    labels: str
    rows: int | str


class Provenance(NamedTuple):
    """Where a policy comes from.

    Attributes:
      family: its model type.
      program: that trained it.
      step: of its parameters, of `steps`.
      steps: of the whole run.
      base: the policy that it started from.
      is_hub_id: whether that is an id on the hub.
    """

    family: str
    program: str
    step: int
    steps: int
    base: str
    is_hub_id: bool


def snippet(folder: str, image: str, prompt: str, max_tokens: int) -> str:
    """Returns Python that asks a policy by transformers alone.

    Args:
      folder: of the policy.
      image: file.
      prompt: text of the user's turn, behind the image.
      max_tokens: longest response.
    """
    return SNIPPET.format(
        folder=json.dumps(folder),
        image=json.dumps(image),
        prompt=json.dumps(prompt, ensure_ascii=False),
        max_tokens=max_tokens,
    )


def model_card(
    name: str,
    provenance: Provenance,
    data_sets: Sequence[DescribedSet],
    changed: Sequence[tuple[str, Any]],
    judges: tuple[str, str],
    evaluations: tuple[Mapping[str, Evaluation], Mapping[str, Evaluation]] | None,
    code: str,
) -> str:
    """Returns a model card.

    Args:
      name: of the policy.
      provenance: where it comes from.
      data_sets: of training and evaluation.
      changed: fields of the config that are not the defaults, and their values.
      judges: who was asked about responses in training and in evaluation.
      evaluations: before and after training; None, or no set after it, shows no results.
      code: as of `snippet`.
    """
    return pages.render(
        "card.md.j2",
        name=name,
        family=provenance.family,
        program=provenance.program,
        step=provenance.step,
        steps=provenance.steps,
        base=provenance.base,
        base_id=provenance.base if provenance.is_hub_id else "",
        data_sets=data_sets,
        changed=changed,
        judges=judges,
        results=report.score_table(*evaluations) if evaluations and evaluations[1] else "",
        snippet=code,
    )


def step_of(card: str) -> int | None:
    """Returns the step that a card of `model_card` names; None of any other text."""
    found = _STEP.search(card)
    return int(found[1]) if found else None
