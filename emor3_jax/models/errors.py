"""Errors of what a user gives as a policy or an image."""


class ShapesError(ValueError):
    """A `config.json` that this implementation cannot run."""


class WeightsError(ValueError):
    """Tensors of a checkpoint that do not fit its `config.json`."""


class ProcessorError(ValueError):
    """Settings of an image processor that are missing or not implemented."""


class ImageError(ValueError):
    """An image that cannot be decoded or resized."""
