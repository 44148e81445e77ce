"""Paths that lead to no data: each kind of data set names them, at once and on one line."""

import gzip
import os

import pytest

from emor3_jax.config import dataset, default
from emor3_jax.errors import UserError
from emor3_jax.prepare.checks import validate
from emor3_jax.prepare.data import load_templates, open_source
from emor3_jax.prepare.sources import SOURCES

NAMES = (
    *("pipe", "folder", "loop", "gone", "archive", "page", "pointer", "other.parquet"),
    *("", "*", "[", "folder/*", "**", "/dev", "/dev/zero", "~nobody/x", "http://a/b"),
    *("n\0l", "x" * 300, "x" * 6000, "a\nb", "caf\udce9"),
)
FIELDS = ("policy.path", "data.templates.set", "data.train.kind", "data.train.columns")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paths")
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "archive").write_bytes(gzip.compress(b'{"image": "x.png"}'))
    (folder / "page").write_text("<html>404</html>")
    (folder / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    (folder / "other.parquet").write_text("hello")
    return folder


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind != "emoscenes"])
def test_a_path_without_data_is_named(folder, monkeypatch, kind):
    monkeypatch.chdir(folder)
    config = default()
    config.data.folder = str(folder / "built")
    for name in NAMES:
        described = dataset(kind=kind, path=name, split="train")
        with pytest.raises(UserError) as raised:
            open_source(config, "data.train", described)
        assert len(str(raised.value)) < 1500 and "\n" not in str(raised.value), name


@pytest.mark.parametrize("field", FIELDS)
def test_a_name_of_nothing_is_refused(folder, monkeypatch, field):
    monkeypatch.chdir(folder)
    for name in NAMES:
        config = default()
        *sections, key = field.split(".")
        section = config
        for each in sections:
            section = section[each]
        # An empty name is the default of some.
        if not name:
            continue
        section[key] = name
        with pytest.raises(UserError):
            validate(config)
            load_templates(config)
