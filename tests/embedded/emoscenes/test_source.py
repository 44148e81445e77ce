"""EmoScenes as rows: index, id, question and image."""

import io

import pytest
from PIL import Image

from emor3_jax.data.errors import DataError
from emor3_jax.embedded.emoscenes import builder
from emor3_jax.embedded.emoscenes.source import EmoScenesSource


def test_emoscenes(tmp_path):
    builder.prepare(tmp_path, 112, {"train": 5, "test": 2})
    source = EmoScenesSource("train", tmp_path, "which ?")
    assert len(source) == 5
    for index, texts in enumerate(source.texts()):
        row = source[index]
        assert row.texts == texts and source.find(texts.id) == index
        assert texts.question == "which ?"
        assert Image.open(io.BytesIO(row.images[0])).size == (112, 112)
    with pytest.raises(DataError, match="split='validation'"):
        EmoScenesSource("validation", tmp_path, "which ?")
