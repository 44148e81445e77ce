"""The command line of a program, beyond what its config checks."""

from pathlib import Path

import pytest

from emor3_jax import cli, train


def test_a_bucket_is_no_folder() -> None:
    assert cli.local_folder("runs/a") == Path("runs/a")
    # As a folder it would be kept on the machine, and go with it.
    with pytest.raises(FileNotFoundError, match=r"--workdir='gs://box/a': must be a folder; mount"):
        cli.local_folder("gs://box/a")


def test_a_stopped_run_is_told_by_its_exit_status(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(train, "train", lambda config, workdir: {})
    with pytest.raises(SystemExit) as stopped:
        train.main(None, tmp_path)
    assert stopped.value.code == cli.STOPPED == 75
    monkeypatch.setattr(train, "train", lambda config, workdir: {"before": {}, "after": {}})
    train.main(None, tmp_path)
