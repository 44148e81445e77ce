"""Writers of small folders in the exact layout of each data set."""

from collections.abc import Callable

import pytest
from support import layouts

from emor3_jax.data.datasets.catalog import open_dataset


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


@pytest.fixture
def opened(tmp_path) -> Callable:
    """Opens a split of a named data set, built below the test's folder."""

    def call(kind, root, split, **options):
        return open_dataset(kind, str(root), split, tmp_path / "data", **options)

    return call
