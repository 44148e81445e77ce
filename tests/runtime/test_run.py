"""Parts of a run that need no run."""

import errno
from pathlib import Path

import pytest

from emor3_jax.errors import RunError, UserError
from emor3_jax.io import console
from emor3_jax.runtime import policy_folder
from emor3_jax.runtime import run as run_module
from emor3_jax.runtime.failures import raise_failure
from emor3_jax.runtime.progress import Pace

GONE = FileNotFoundError(errno.ENOENT, "No such file or directory", "b.png")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            GONE,
            r"^runs/a: .* after step 7 by No such file or directory; mend that \(b.png\), and",
        ),
        (
            OSError(errno.ENOSPC, "", "c"),
            r"No space left on device; make room \(c\), and start",
        ),
        # As safetensors and tensorstore tell it.
        (
            RuntimeError("I/O error: No space left (os error 28)"),
            "No space left on device; make",
        ),
        (
            ValueError("Failed to write [os_error_code='28']\nat"),
            "No space left on device; make",
        ),
    ],
)
def test_a_late_error_of_the_file_system_ends_with_status_1(error: Exception, said: str) -> None:
    with pytest.raises(RunError, match=said):
        raise_failure(error, Path("runs/a"), 7, begun=True)


def test_only_before_the_first_step_a_missing_file_is_the_users() -> None:
    raise_failure(GONE, Path("runs/a"), 7, begun=False)
    for error in (None, ValueError("of the program's own"), UserError("a file: (os error 2)")):
        raise_failure(error, Path("runs/a"), 7, begun=True)


def test_a_folder_that_may_not_be_written_is_the_users_before_the_first_step() -> None:
    # With status 1, `tpu/watch.sh` would start such a run for ever.
    denied = PermissionError(errno.EACCES, "", "runs/a/.lock")
    with pytest.raises(UserError, match=r"--workdir='runs/a': Permission denied; .*\.lock\), or"):
        raise_failure(denied, Path("runs/a"), 7, begun=False)
    with pytest.raises(RunError, match=r"^runs/a: .* after step 7 by Permission denied"):
        raise_failure(denied, Path("runs/a"), 7, begun=True)


def test_the_time_that_is_left_does_not_count_the_compile(monkeypatch) -> None:
    now = iter([500.0, 502.0, 504.0])
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: next(now))
    pace = Pace(8)
    # The first step of this start took minutes.
    assert [pace.left(step) for step in (3, 4, 5)] == ["?", "8s", "6s"]


def test_output_that_is_gone_ends_no_run(monkeypatch) -> None:
    class Gone:
        def write(self, _):
            raise OSError(errno.EIO, "Input/output error")

        def flush(self):
            pass

    monkeypatch.setattr(console.sys, "stdout", Gone())
    say = console.Console("train")
    say("nobody hears it")
    say("nor this")
    assert not isinstance(console.sys.stdout, Gone)
    console.sys.stdout.close()


def test_a_policy_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "policy"

    def save(policy, place):
        place.mkdir()
        (place / "config.json").write_text(policy)
        if policy == "bad":
            raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(policy_folder, "save", save)
    for policy in ("one", "two", "bad"):
        (tmp_path / "policy.new").mkdir()
        try:
            policy_folder.save_whole(policy, folder)
        except OSError:
            assert policy == "bad"
    assert (folder / "config.json").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


class _End:
    """Something that a run closes, which may fail."""

    def __init__(self, error: Exception | None, ended: list) -> None:
        self.error, self.ended = error, ended

    def close(self) -> None:
        self.ended.append(self)
        if self.error is not None:
            raise self.error

    restore = release = close


def test_of_errors_of_closing_the_first_is_told_and_none_hides_that_of_the_run(caplog) -> None:
    full, late = RunError("the checkpoint could not be written"), OSError(27, "File too large")
    ended: list[_End] = []
    run = run_module.Run.__new__(run_module.Run)
    for name in ("clock", "_maintenance", "_task", "_stop", "_lock", "_scope"):
        setattr(run, name, _End(None, ended))
    run._checkpoints, run._writer = _End(full, ended), _End(late, ended)
    with pytest.raises(RunError, match="could not be written"):
        run.close()
    assert len(ended) == 8 and "File too large" in caplog.text
    run.workdir, run._step, run._begun = Path("run"), 3, True
    with pytest.raises(UserError, match="the run's own"), run:
        raise UserError("the run's own")
    assert len(ended) == 16
