"""The command line of a program, beyond what its config checks."""

from pathlib import Path

import pytest

from emor3_jax.runtime import cli


def test_a_bucket_is_no_folder() -> None:
    assert cli.local_folder("runs/a") == Path("runs/a")
    # As a folder it would be kept on the machine, and go with it.
    with pytest.raises(FileNotFoundError, match=r"--workdir='gs://box/a': must be a folder; mount"):
        cli.local_folder("gs://box/a")


def test_a_stopped_run_is_told_by_its_exit_status() -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.end({}, may_stop=True)
    assert stopped.value.code == cli.STOPPED == 75
    cli.end({"before": {}, "after": {}}, may_stop=True)
    cli.end(None, may_stop=False)
