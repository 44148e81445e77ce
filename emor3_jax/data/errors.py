"""What is raised when data cannot be used."""


class DataError(ValueError):
    """Data, a label set or a template is unusable: names the field, its value and the way out."""
