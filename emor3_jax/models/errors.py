"""Errors of what a user gives as a policy or an image."""

from collections.abc import Mapping
from typing import Any

from emor3_jax.errors import UserError


class ShapesError(UserError):
    """A `config.json` that this implementation cannot run."""


class WeightsError(UserError):
    """Tensors of a checkpoint that do not fit its `config.json`."""


class ProcessorError(UserError):
    """Settings of an image processor that are missing or not implemented."""


class ImageError(UserError):
    """An image that cannot be decoded or resized."""


def refuse_code(data: Mapping[str, Any], file: str, error: type[UserError]) -> None:
    """Raises an error of a kind if a file of a policy's folder names code of its own."""
    if data.get("auto_map"):
        raise error(
            f"{file} has an auto_map ({str(data['auto_map'])[:80]}): code in a policy's folder is "
            "never run; if the policy is a plain one, remove the field"
        )
