"""Names and values of the columns of parquet files, JSON lines and folders of `datasets`."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from emor3_jax.data.errors import DataError

ROLES = ("image", "question", "answer", "distribution", "response", "id", "split")
"""What a column may be to a row."""


def parse_columns(text: str) -> dict[str, str]:
    """Reads `role:column` pairs joined by commas, such as `image:photo,answer:emotion`.

    Returns:
      Role → column.

    Raises:
      DataError: if a pair has another form, or a role is unknown or named twice.
    """
    found: dict[str, str] = {}
    for pair in filter(None, (each.strip() for each in text.split(","))):
        role, colon, column = (each.strip() for each in pair.partition(":"))
        if not colon or not column or role not in ROLES or role in found:
            raise DataError(
                f"columns={text!r}: {pair!r} must be role:column, each role once; roles are "
                f"{', '.join(ROLES)}"
            )
        found[role] = column
    return found


def features_of(schema: pa.Schema) -> dict[str, dict]:
    """Returns the features that `datasets` keeps in a schema, {} where there are none."""
    kept = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(kept)["info"]["features"] if kept else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def label_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Returns the names of a ClassLabel column, () where the column holds its labels itself."""
    return tuple(map(str, features_of(schema).get(column, {}).get("names", ())))


def is_text(kind: pa.DataType) -> bool:
    """Recognises columns of texts: plain, dictionary-encoded, or all null."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def text_of(row: Mapping[str, Any], name: str, where: str) -> str | None:
    """Returns a text of a JSON object, None if it is missing or null.

    Raises:
      DataError: if it is something else, naming the place, the field and its value.
    """
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"{where}: {name!r} is {json.dumps(value)[:80]}, not a text; write the label or "
            "question itself"
        )
    return value


def shares_of(row: Mapping[str, Any], name: str, where: str) -> list[dict] | None:
    """Returns {label: share} of a JSON object as a list of {label, share}; None without.

    Raises:
      DataError: if it is something else, or a share is no number.
    """
    shares = row.get(name)
    if shares is None:
        return None
    if not isinstance(shares, dict):
        raise DataError(f"{where}: {name!r} is no object {{label: share}}")
    for label, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float | None):
            raise DataError(f"{where}: the share of {label!r} in {name!r} is {share!r}, no number")
    return [{"label": label, "share": share} for label, share in shares.items()]
