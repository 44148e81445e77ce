"""Names and values of the columns of parquet files, JSON lines and folders of `datasets`."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from emor3_jax.data.errors import DataError
from emor3_jax.errors import UserError
from emor3_jax.files import parse_json

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
        told = parse_json(kept.decode(), "the schema", DataError, dict) if kept else {}
        features = told["info"]["features"] if told else {}
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (UserError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return {}


def label_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Returns the names of a ClassLabel column, () where the column holds its labels itself."""
    names = features_of(schema).get(column, {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def is_text(kind: pa.DataType) -> bool:
    """Recognises columns of texts: plain, dictionary-encoded, or all null."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(test(kind) for test in tests)


def check_images(where: str, schema: pa.Schema, column: str) -> None:
    """Checks that a column holds images: {bytes, path}, a list of them, bytes, or paths.

    Args:
      where: names the file in errors.
      schema: of the file, with the column.
      column: its name.

    Raises:
      DataError: naming the column and its type.
    """
    kind = schema.field(column).type
    many = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    one = kind.value_type if many else kind
    if pa.types.is_struct(one):
        parts = {part.name: part.type for part in one}
        fits = _is_binary(parts.get("bytes")) and is_text(parts.get("path", pa.null()))
    else:
        fits = _is_binary(one) or is_text(one)
    if not fits:
        raise DataError(
            f"{where}: column {column!r} is {_short(kind)}, not a list of {{bytes, path}}, one "
            "such, bytes, or the path of a file"
        )


def check_answers(where: str, schema: pa.Schema, column: str) -> None:
    """Checks that a column holds labels: texts, or whole numbers that the file names.

    Args:
      where, schema, column: as of `check_images`, which says what is raised.
    """
    kind = schema.field(column).type
    if not is_text(kind) and not (pa.types.is_integer(kind) and label_names(schema, column)):
        raise DataError(
            f"{where}: column {column!r} is {_short(kind)}, not a text, and the file does not name "
            "its numbers; save the labels as texts, or with a ClassLabel feature"
        )


def check_texts(where: str, schema: pa.Schema, column: str) -> None:
    """Checks that a column, if it is there, holds texts; otherwise as `check_images`."""
    if column in schema.names and not is_text(schema.field(column).type):
        kind = _short(schema.field(column).type)
        raise DataError(f"{where}: column {column!r} is {kind}, not a text")


def check_responses(where: str, schema: pa.Schema, column: str) -> None:
    """Checks that a column, if it is there, holds texts or lists of them; as `check_images`."""
    if column not in schema.names:
        return
    kind = said = schema.field(column).type
    said = said.value_type if pa.types.is_list(said) or pa.types.is_large_list(said) else said
    if not is_text(said):
        raise DataError(
            f"{where}: column {column!r} is {_short(kind)}, not a text or a list of texts"
        )


def check_shares(where: str, schema: pa.Schema, column: str) -> None:
    """Checks that a column, if it is there, holds lists of {label, share}; as `check_images`."""
    if column not in schema.names:
        return
    kind = schema.field(column).type
    fits = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if fits and (fits := pa.types.is_struct(kind.value_type)):
        parts = {part.name: part.type for part in kind.value_type}
        share = parts.get("share", pa.string())
        fits = is_text(parts.get("label", pa.int8()))
        fits = fits and any(
            test(share) for test in (pa.types.is_floating, pa.types.is_integer, pa.types.is_null)
        )
    if not fits:
        raise DataError(
            f"{where}: column {column!r} is {_short(kind)}, not a list of {{label, share}}, a text "
            "and a number"
        )


def _is_binary(kind: pa.DataType | None) -> bool:
    types = pa.types
    tests = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null)
    return kind is not None and any(test(kind) for test in tests)


def _short(kind: pa.DataType) -> str:
    return str(kind)[:200]


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


def texts_of(row: Mapping[str, Any], name: str, where: str) -> str | list[str] | None:
    """Returns a text or a list of texts of a JSON object, None if it is missing or null.

    Raises:
      DataError: as `text_of`.
    """
    value = row.get(name)
    if isinstance(value, list) and all(isinstance(each, str | None) for each in value):
        return value
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"{where}: {name!r} is {json.dumps(value)[:80]}, neither a text nor a list of texts"
        )
    return value


def id_of(row: Mapping[str, Any], name: str, where: str) -> str | None:
    """Returns the id of a JSON object as a text, None if it is missing or null.

    Raises:
      DataError: if it is neither a text of one line nor a whole number.
    """
    value = row.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not is_number and not (isinstance(value, str) and not {"\n", "\r"} & set(value)):
        raise DataError(
            f"{where}: {name!r} is {json.dumps(value)[:80]}, neither a whole number nor a text of "
            "one line"
        )
    return str(value)


def shares_of(row: Mapping[str, Any], name: str, where: str) -> list[dict] | None:
    """Returns {label: share} of a JSON object as a list of {label, share}; None without.

    Raises:
      DataError: if it is something else, or a share is no number, or too large for one.
    """
    shares = row.get(name)
    if shares is None:
        return None
    if not isinstance(shares, dict):
        raise DataError(f"{where}: {name!r} is no object {{label: share}}")
    for label, share in shares.items():
        fits = isinstance(share, int | float | None) and not isinstance(share, bool)
        if not fits or (share and not abs(share) < 1e300):
            raise DataError(
                f"{where}: the share of {label!r} in {name!r} is {repr(share)[:80]}, no number"
            )
    return [{"label": label, "share": share} for label, share in shares.items()]
