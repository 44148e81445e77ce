"""Errors of what a user gives as a policy or an image."""

from emor3_jax.errors import UserError


class ShapesError(UserError):
    """A `config.json` that this implementation cannot run."""


class WeightsError(UserError):
    """Tensors of a checkpoint that do not fit its `config.json`."""


class ProcessorError(UserError):
    """Settings of an image processor that are missing or not implemented."""


class ImageError(UserError):
    """An image that cannot be decoded or resized."""
