"""Grey images as faces, shared by the tests of base policy and loaders."""

import pytest
from ml_collections import ConfigDict
from support import tiny_faces

from emor3_jax.embedded.faces.captions import CaptionLoader


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
    return tiny_faces.make_config(tmp_path_factory.mktemp("faces"))


@pytest.fixture(scope="session")
def captions(config: ConfigDict) -> CaptionLoader:
    return tiny_faces.make_captions(config)
