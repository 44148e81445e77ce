"""JSON files of a policy's folder."""

import json
from pathlib import Path
from typing import Any

from emor3_jax.errors import UserError


def read_object(path: Path, error: type[UserError]) -> dict[str, Any]:
    """Returns the contents of a file that holds one JSON object.

    Args:
      path: of the file, which exists.
      error: raised, with the file's name, if it holds anything else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as cause:
        raise error(f"{path} is not JSON: {cause}; download it again") from cause
    if not isinstance(data, dict):
        raise error(f"{path} holds a {type(data).__name__}, where JSON's {{…}} is expected")
    return data
