"""Trials: a run to which something happens, started again, and compared with one left alone."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from faults import child
from faults.child import Fault
from support import compiler_flags
from support.tiny_run import make_folder, read_metrics

from emor3_jax.io.sinks.tensorboard import read_events
from emor3_jax.train import train

ROOT = Path(__file__).parents[2]

_NOT_COMPARED = ("time/", "throughput/", "memory/", "compile/")
"""Metrics of the machine, not of the run."""

PATIENCE = 600.0


class Ended(NamedTuple):
    """A victim that has ended.

    Attributes:
      workdir: of its run.
      status: exit status, negative for a signal.
      printed: on both streams.
      steps: that it took.
      left: whether processes of its group were there a minute later.
    """

    workdir: Path
    status: int
    printed: str
    steps: int
    left: bool


class Verdict(NamedTuple):
    """What became of a run.

    Attributes:
      wrong: what is not as it should be; () if it survived.
      lost: steps that were taken twice.
    """

    wrong: tuple[str, ...]
    lost: int = 0


class Trials:
    """A folder with policy and data, one run left alone, and those that something happens to.

    Attributes:
      folder: of all.
      whole: folder of the run left alone.
    """

    def __init__(self, folder: Path) -> None:
        """Makes policy and data, and starts the server that victims are forked from.

        Args:
          folder: empty.
        """
        self.folder = make_folder(folder)
        self.whole, self._number = folder / "whole", 0
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["faults.child"])

    def start(self, fault: Fault, workdir: Path | None = None) -> tuple[Path, BaseProcess]:
        """Starts a victim; returns the folder of its run and its process."""
        self._number += 1
        workdir = workdir or self.folder / f"run{self._number}"
        with _environment():
            args = self.folder, workdir, fault, dict(os.environ)
            process = self._processes.Process(target=child.run, args=args)
            process.start()
        return workdir, process

    def end(self, workdir: Path, process: BaseProcess) -> Ended:
        """Waits for the end of a victim."""
        process.join(PATIENCE)
        left = not _eventually(lambda: _group_is_empty(process.pid), 60.0)
        for each in (process.pid,) if left else ():
            os.killpg(each, signal.SIGKILL)
        log, steps = (workdir.with_name(workdir.name + end) for end in (".log", ".steps"))
        taken = int(steps.read_text() or 0) if steps.exists() else 0
        return Ended(workdir, process.exitcode, log.read_text(errors="replace"), taken, left)

    def suffer(self, fault: Fault) -> Ended:
        """Runs a victim to its end."""
        return self.end(*self.start(fault))

    def leave_alone(self) -> Path:
        """Returns the folder of a whole run, in this process."""
        if not self.whole.exists():
            self.go_on(self.whole)
        return self.whole

    def go_on(self, workdir: Path) -> None:
        """Starts a run again in this process, to its end."""
        config = child.make_config(self.folder)
        assert train(config, workdir)

    def judge(self, ended: Ended, wanted: int, said: tuple[str, ...] = ()) -> Verdict:
        """Starts a run again, and compares it with the one left alone.

        Args:
          ended: the run.
          wanted: exit status, negative for a signal.
          said: what it must have printed.
        """
        workdir, wrong = ended.workdir, []
        if ended.status != wanted:
            wrong.append(f"status {ended.status}, not {wanted}")
        wrong += [f"did not say {text!r}" for text in said if text not in ended.printed]
        if ended.status >= 0:
            bad = ("Traceback", "KeyboardInterrupt", "leaked", "Exception ignored")
            wrong += [f"printed {text!r}" for text in bad if text in ended.printed]
            wrong += [f"left {path.name}" for path in leftovers(workdir)]
        if ended.left:
            wrong.append("left processes behind")
        saved = newest(workdir)
        try:
            self.go_on(workdir)
            wrong += self.differences(workdir)
        except BaseException as error:
            wrong.append(f"start again: {type(error).__name__}: {str(error)[:200]}")
        wrong += [f"left {path.name}" for path in leftovers(workdir)]
        return Verdict(tuple(wrong), max(ended.steps - saved, 0))

    def differences(self, workdir: Path) -> list[str]:
        """Returns what of a run that ended is not as in the run left alone."""
        whole, found = self.leave_alone(), []
        for name in ("policy/model.safetensors", "policy/config.json", "evaluations.json"):
            if (workdir / name).read_bytes() != (whole / name).read_bytes():
                found.append(name)
        if compared(workdir) != compared(whole):
            found.append("metrics.jsonl")
        if events(workdir) != events(whole):
            found.append("events")
        for path in sorted(whole.glob("predictions/*/*")):
            if (workdir / path.relative_to(whole)).read_bytes() != path.read_bytes():
                found.append(str(path.relative_to(whole)))
        if newest(workdir) != newest(whole):
            found.append("checkpoints")
        return found


def compared(workdir: Path) -> list[list[tuple[str, Any]]]:
    """Returns the metrics of a run, line by line, but for those of the machine."""
    rows = read_metrics(workdir)
    return [[x for x in row.items() if not x[0].startswith(_NOT_COMPARED)] for row in rows]


def events(workdir: Path) -> list[tuple[int, str, float]]:
    """Returns the events of a run that count, in their order, but for those of the machine."""
    kept: list[tuple[int, str, float]] = []
    for event in read_events(workdir / "events"):
        if event.HasField("session_log"):
            kept = [each for each in kept if each[0] < event.step]
        found = [(event.step, x.tag, x.simple_value) for x in event.summary.value]
        kept += [each for each in found if not each[1].startswith(_NOT_COMPARED)]
    return kept


def newest(workdir: Path) -> int:
    """Returns the newest checkpoint, 0 if there is none."""
    folders = (workdir / "checkpoints").glob("*")
    return max((int(path.name) for path in folders if path.name.isdigit()), default=0)


def leftovers(workdir: Path) -> list[Path]:
    """Returns what was begun and is of no use."""
    parts = ("checkpoints/*tmp*", "policy.new", "policy.old", "*.jsonl.new")
    return [path for part in parts for path in workdir.glob(part)]


def flip_a_bit(checkpoint: Path) -> None:
    """Changes one bit in the largest file."""
    path = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def cut_a_file(checkpoint: Path) -> None:
    """Takes the second half of the largest file away."""
    path = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_the_progress(checkpoint: Path) -> None:
    """Leaves the JSON of the progress without content."""
    for path in (checkpoint / "progress").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def lose_the_state(checkpoint: Path) -> None:
    """Removes the folder of the arrays."""
    shutil.rmtree(checkpoint / "state")


def lose_everything(checkpoint: Path) -> None:
    """Leaves an empty folder."""
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def damage_the_metadata(checkpoint: Path) -> None:
    """Writes nonsense over what describes the arrays."""
    (checkpoint / "state" / "_METADATA").write_text("{")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit flipped": flip_a_bit,
    "a file cut short": cut_a_file,
    "progress empty": empty_the_progress,
    "arrays gone": lose_the_state,
    "folder empty": lose_everything,
    "metadata damaged": damage_the_metadata,
}
"""What may happen to the newest checkpoint, which a run that goes on must notice."""


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Sets the environment of the server of processes, which it starts with."""
    wanted = {
        "XLA_FLAGS": compiler_flags.FAST,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _group_is_empty(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def _eventually(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
