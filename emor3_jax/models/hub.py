"""Folders of policies in Hugging Face's format, on disk or on the hub."""

import os
import re
from pathlib import Path

from emor3_jax.files import is_folder, read_json, show
from emor3_jax.models.errors import ShapesError, refuse_code
from emor3_jax.models.families import FAMILIES, NOT_YET
from emor3_jax.models.policy import Policy

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*"]
"""Files of a repository that are downloaded: no weights in other formats, and no code."""


def find(name: str | Path) -> Path:
    """Returns the folder of a policy, downloading it first if the name is one of the hub's.

    Args:
      name: as `load` takes it. A folder of that name wins over the hub.

    Raises:
      FileNotFoundError: if it is neither.
      ShapesError: if the hub's cannot be loaded, by its `config.json`; no weights are downloaded.
    """
    folder = Path(name)
    if is_folder(folder):
        return folder
    match = _HUB_ID.fullmatch(str(name))
    if match is None:
        raise FileNotFoundError(
            f"there is no folder {show(name)}, and an id on the hub is 'owner/name'"
        )
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, revision = match.groups()
    try:
        config = Path(hf_hub_download(repository, "config.json", revision=revision))
        try:
            # A refusal must not come after hours of download.
            parse_config(read_json(config, ShapesError, dict))
        except ShapesError as error:
            raise ShapesError(f"{name} on the hub: {error}") from error
        commit = config.parent.name
        return Path(snapshot_download(repository, revision=commit, allow_patterns=_HUB_FILES))
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
        raise ShapesError(
            f"config.json has model_type={repr(kind)[:80]}{_why_not(str(kind))}; only {known} "
            "policies can be loaded"
        )
    for part in (data, data.get("text_config"), data.get("vision_config")):
        for field in _QUANTISED:
            if isinstance(part, dict) and (quantised := part.get(field)):
                raise ShapesError(
                    f"config.json has a {field} ({_method(quantised)}): quantised weights cannot "
                    "be trained; give the policy that they were made from, in bfloat16"
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


_QUANTISED = ("quantization_config", "compression_config", "quantization")
"""Fields of `config.json` that say how its weights are quantised; the last is MLX's."""


def _method(quantised: object) -> str:
    """Returns the name of a way to quantise, as far as a field says it."""
    if not isinstance(quantised, dict):
        return str(quantised)[:80]
    bits = quantised.get("bits")
    return str(quantised.get("quant_method", f"{bits} bits" if bits else "an unknown method"))[:80]


def _why_not(kind: str) -> str:
    """Returns why a `model_type` cannot be loaded, as a part of the error's sentence."""
    # A relative's parts have names of their own, such as that of Qwen3-Omni's thinker.
    relatives = [name for name in NOT_YET if kind == name or kind.startswith(f"{name}_")]
    if relatives:
        return f" ({NOT_YET[max(relatives, key=len)]}), which is not supported yet"
    whole = kind.removesuffix("_text").removesuffix("_vision")
    if whole in FAMILIES:
        return ", which is only a part of a policy: give the folder of the whole"
    return ", which is not known"


def read_config(folder: str | Path) -> Policy:
    """Reads the `config.json` of a folder; raises as `load`."""
    path, adapter = Path(folder) / "config.json", Path(folder) / "adapter_config.json"
    if not os.path.lexists(path):
        rule = "give a folder in Hugging Face's format"
        if adapter.exists():
            rule = "the folder holds an adapter alone: merge it into its policy, and give that"
        raise FileNotFoundError(f"{path} does not exist; {rule}")
    if adapter.exists():
        # transformers reads both, and takes the base that the adapter names.
        raise ShapesError(
            f"{adapter} lies beside config.json: adapters are not read; merge it into the policy, "
            "or move it away"
        )
    data = read_json(path, ShapesError, dict)
    try:
        return parse_config(data)
    except ShapesError as error:
        raise ShapesError(f"{path}: {error}") from error
