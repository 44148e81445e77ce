"""Folders of policies in Hugging Face's format, on disk or on the hub."""

import os
import re
from pathlib import Path

from emor3_jax.files import is_folder, read_json, show
from emor3_jax.models.errors import ShapesError, refuse_code
from emor3_jax.models.families import FAMILIES, NOT_YET
from emor3_jax.models.policy import Policy

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
"""Files of a repository that are downloaded: no weights in other formats."""


def find(name: str | Path) -> Path:
    """Returns the folder of a policy, downloading it first if the name is one of the hub's.

    Args:
      name: as `load` takes it. A folder of that name wins over the hub.

    Raises:
      FileNotFoundError: if it is neither.
    """
    folder = Path(name)
    if is_folder(folder):
        return folder
    match = _HUB_ID.fullmatch(str(name))
    if match is None:
        raise FileNotFoundError(
            f"there is no folder {show(name)}, and an id on the hub is 'owner/name'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, revision = match.groups()
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and the hub gave no policy of that name: {error}"
        ) from error


def is_hub_id(name: str) -> bool:
    """Returns whether a name has the form of an id on the hub."""
    return _HUB_ID.fullmatch(name) is not None


def published(name: str) -> Policy | None:
    """Returns a policy that is published on the hub under an id, without any download."""
    for family in FAMILIES.values():
        if (shapes := family.published.get(name.partition("@")[0])) is not None:
            return Policy(family, shapes)
    return None


def parse_config(data: dict) -> Policy:
    """Returns the policy that the contents of a `config.json` describe.

    Raises:
      ShapesError: if its family is unknown, or it asks for something that is not implemented.
    """
    refuse_code(data, "config.json", ShapesError)
    kind = data.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        known = ", ".join(map(repr, FAMILIES))
        known_relative = isinstance(kind, str) and kind in NOT_YET
        name = f" ({NOT_YET[kind]})" if known_relative else ""
        yet = "is not supported yet" if known_relative else "is not known"
        raise ShapesError(
            f"config.json has model_type={kind!r}{name}, which {yet}; only {known} policies can be "
            "loaded"
        )
    if quantised := data.get("quantization_config"):
        named = isinstance(quantised, dict)
        method = quantised.get("quant_method", "an unknown method") if named else quantised
        raise ShapesError(
            f"config.json has a quantization_config ({method}): quantised weights cannot be "
            "trained; give the policy that they were made from, in bfloat16"
        )
    try:
        return Policy(family, family.shapes(data))
    except ShapesError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise ShapesError(
            f"config.json has a field of another type than it should be ({error}); download it "
            "again"
        ) from error


def read_config(folder: str | Path) -> Policy:
    """Reads the `config.json` of a folder; raises as `load`."""
    path = Path(folder) / "config.json"
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path} does not exist; give a folder in Hugging Face's format")
    data = read_json(path, ShapesError, dict)
    try:
        return parse_config(data)
    except ShapesError as error:
        raise ShapesError(f"{path}: {error}") from error
