"""Errors of data that cannot be used."""

from emor3_jax.errors import UserError


class DataError(UserError):
    """Data, a label set or a template is unusable: names the field, its value and the way out."""
