"""The tokenizer of a policy's folder: read without running code, written for transformers 4 too.

Deviations, numbered:
 1. transformers 5 writes the list of further special tokens as `extra_special_tokens`, where
    transformers 4 expects an object and fails. Here it is `additional_special_tokens`, which both
    read, with equal ids (docs/reliability.md).
"""

import json
import os
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase, Qwen2TokenizerFast

from emor3_jax.files import MAX_JSON_BYTES, MAX_TEMPLATE_BYTES, open_regular, read_json, read_text
from emor3_jax.models.errors import ProcessorError, refuse_code

_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_SMALL_FILES = (
    _CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    # Not read here, but kept at export.
    "generation_config.json",
)
PROCESSOR_FILE = "processor_config.json"
"""What transformers 5 writes for a whole processor, with the settings of images inside."""

# Where older folders keep the chat template, before that of the tokenizer, and where newer ones do.
_TEMPLATES_OF_PROCESSORS = ("chat_template.json", PROCESSOR_FILE)
_TEMPLATE_FILE = "chat_template.jinja"
# By which prompts find an image.
_MARKS = ("<|image_pad|>", "<|vision_end|>", "<|im_end|>")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Reads the tokenizer of a folder in Hugging Face's format.

    Args:
      folder: with `tokenizer.json`, or `vocab.json` and `merges.txt`.

    Raises:
      FileNotFoundError: if there is no tokenizer.
      ProcessorError: if a file is damaged or names code, or there is no chat template.
    """
    there = {name for name in os.listdir(folder) if name.endswith((".json", ".txt", ".jinja"))}
    for name in sorted(there):
        os.close(open_regular(folder / name, MAX_JSON_BYTES, ProcessorError))
    if _TOKENIZER_FILE not in there and not {"vocab.json", "merges.txt"} <= there:
        raise FileNotFoundError(
            f"{folder} has neither {_TOKENIZER_FILE} nor vocab.json and merges.txt; download the "
            "tokenizer too"
        )
    for name in _SMALL_FILES:
        if name in there:
            data = read_json(folder / name, ProcessorError, dict)
            refuse_code(data, str(folder / name), ProcessorError)
    try:
        tokenizer = Qwen2TokenizerFast.from_pretrained(folder)
        tokenizer.encode("a", add_special_tokens=False)
    except BaseException as error:
        # Its parts raise errors of any kind, and the library in Rust one that is no Exception.
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ProcessorError(
            f"{folder}: the tokenizer cannot be read ({type(error).__name__}: {error}); download "
            "its files again"
        ) from error
    for name in _TEMPLATES_OF_PROCESSORS:
        if name in there:
            found = read_json(folder / name, ProcessorError, dict).get("chat_template")
            tokenizer.chat_template = found or tokenizer.chat_template
    if _TEMPLATE_FILE in there:
        # Read again, since transformers takes it as it is.
        read_text(folder / _TEMPLATE_FILE, ProcessorError, MAX_TEMPLATE_BYTES)
    template = tokenizer.chat_template
    if not template:
        raise ProcessorError(f"{folder}: the tokenizer has no chat template; add one")
    if not isinstance(template, str):
        raise ProcessorError(
            f"{folder}: the chat template is {type(template).__name__}, not one text; keep the one "
            "for chats with images, in chat_template.jinja"
        )
    try:
        # Only the syntax; it is rendered in transformers' sandbox.
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except (jinja2.TemplateError, RecursionError) as error:
        if "generation" not in str(error):
            raise ProcessorError(f"{folder}: the chat template is damaged: {error}") from error
    for token in _MARKS:
        if tokenizer.encode(token, add_special_tokens=False) != [tokenizer.get_vocab().get(token)]:
            raise ProcessorError(
                f"{folder}: {token} is no token of the tokenizer; take the tokenizer of a Qwen-VL "
                "policy"
            )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer into a folder, for transformers 4 and 5.

    Args:
      tokenizer: the policy's.
      folder: exists.
    """
    tokenizer.save_pretrained(folder)
    path = folder / _CONFIG_FILE
    data = json.loads(path.read_text(encoding="utf-8"))
    extra = data.get("extra_special_tokens")
    if isinstance(extra, list):
        del data["extra_special_tokens"]
        listed = data.get("additional_special_tokens") or []
        data["additional_special_tokens"] = listed + [x for x in extra if x not in listed]
        text = json.dumps(data, indent=2, ensure_ascii=False, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")
