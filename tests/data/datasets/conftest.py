"""Writers of small folders in the exact layout of each data set."""

from collections.abc import Callable

import pytest
from support import layouts


@pytest.fixture(scope="session")
def write() -> dict[str, Callable]:
    """The writers of `support.layouts`."""
    return {
        "image": layouts.write_image,
        "emoset": layouts.emoset,
        "emotion6": layouts.emotion6,
        "classes": layouts.classes,
        "fer_csv": layouts.fer_csv,
    }
