"""The table of faults: `make faults`, or `python -m tests.faults [--only PART,PART] [--seed SEED]`.

Each row is one kind of fault. A run survives it if, started again, it has the same parameters,
metrics, events, predictions and checkpoints as a run left alone, byte by byte but for times and
memory, with no line twice or missing.
"""

import argparse
import contextlib
import io
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from faults.child import CALLS, FILES, Fault
from faults.trial import DAMAGES, Ended, Trials, Verdict, newest

MOMENTS = 20
"""Random moments of `kill -9`."""

_MOST = {
    **{"opening the data": 1, "sampling": 9, "updating": 12, "logging": 7},
    **{"saving": 3, "writing the policy": 1, "ending a step": 6},
    **{"a file of a checkpoint": 60, "a file of the policy": 6, "a line of metrics": 7},
    **{"a file of events": 2, "a prediction": 4},
}
"""How often each moment comes in a run left alone, at least."""


class Row(NamedTuple):
    """One kind of fault.

    Attributes:
      name: in the table.
      faults: each for a victim of its own.
      status: exit status of a victim, negative for a signal.
      said: what it must print.
      tries: what is tried in another way, in place of `faults`.
    """

    name: str
    faults: Sequence[Fault] = ()
    status: int = -9
    said: tuple[str, ...] = ()
    tries: tuple[Callable[[], Verdict], ...] = ()


class Table:
    """The rows. Victims run one after the other, beside the runs that are started again here."""

    def __init__(self, trials: Trials, seed: int) -> None:
        """Draws the moments.

        Args:
          trials: where to try.
          seed: of the moments.
        """
        self._trials, self._rng = trials, np.random.default_rng(seed)
        self._victims = ThreadPoolExecutor(1)

    def rows(self) -> Iterator[Row]:
        """Yields the kinds of faults."""
        killed = [self._drawn(place) for place in (*FILES, *CALLS)]
        killed += [self._drawn() for _ in range(MOMENTS - len(killed))]
        yield Row("kill -9 at a random moment", killed)
        late = [Fault("saving", n, "kill", self._delay(0.3)) for n in (1, 2, 3)]
        yield Row("kill -9 while a checkpoint is written", late)
        late = [Fault("writing the policy", 1, "kill", self._delay(0.1)) for _ in range(2)]
        yield Row("kill -9 while the policy is written", late)
        for name in ("TERM", "INT", "HUP"):
            asked = [Fault("updating", 5, name), Fault("sampling", 3, name)]
            yield Row(f"SIG{name} to the process", asked, 75, ("asked to stop",))
            group = [Fault("updating", 7, f"group {name}", workers=2)]
            name = f"SIG{name} to the group, two data workers"
            yield Row(name, group, 75, ("asked to stop",))
        said = "error: ", "could not be written: File too large; make room there, and start again"
        full = [Fault("saving", n, "full") for n in (1, 2)]
        yield Row("no room for a checkpoint", full, 1, said)
        # A checkpoint may be on its way then, and be told first.
        said = "error: ", "File too large; make room", "start again"
        for name, moment, call in (
            ("metrics", "logging", 5),
            ("the policy", "writing the policy", 1),
            ("an evaluation", "a prediction", 4),
        ):
            yield Row(f"no room for {name}", [Fault(moment, call, "full")], 1, said)
        yield Row("a full tmpfs while a checkpoint is written", tries=(self._tmpfs,))
        gone = [Fault("sampling", 5, "lose")]
        yield Row("a file that is gone in a step", gone, 1, ("error: ", "gone.png"))
        for name, damage in DAMAGES.items():
            yield Row(f"newest checkpoint: {name}", tries=(partial(self._damaged, damage),))
        yield Row("two runs in one workdir", tries=(self._two,))
        alone = [Fault("updating", 99, "kill", workers=2)]
        yield Row("none, two data workers", alone, 0)
        orphaned = [Fault("updating", 7, "kill", workers=2)]
        yield Row("the parent of two data workers killed", orphaned)

    def begin(self, row: Row) -> list[Callable[[], Verdict]]:
        """Lets the victims of a row wait for their turn; returns what judges each."""

        def judged(victim: Future[Ended]) -> Callable[[], Verdict]:
            return lambda: self._trials.judge(victim.result(), row.status, row.said)

        victims = [self._victims.submit(self._trials.suffer, fault) for fault in row.faults]
        return [*map(judged, victims), *row.tries]

    def _delay(self, most: float) -> float:
        return float(self._rng.uniform(0.001, most))

    def _drawn(self, moment: str = "") -> Fault:
        moment = moment or str(self._rng.choice(list(_MOST)))
        return Fault(moment, 1 + int(self._rng.integers(_MOST[moment])), "kill")

    def _tmpfs(self) -> Verdict:
        """A file takes all that is left of a small file system."""
        workdir = self._trials.folder / "tmpfs"
        workdir.mkdir()
        mounted = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(workdir)]
        if subprocess.run(mounted, capture_output=True).returncode:
            raise NotTried("tmpfs cannot be mounted here")
        try:
            started = self._trials.start(Fault("saving", 2, "pause"), workdir)
            files = workdir.with_name("tmpfs.files")
            _wait_for(files / "paused")
            filler = workdir / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
            # For folders and small files.
            os.truncate(filler, filler.stat().st_size - 65536)
            (files / "go on").touch()
            ended = self._trials.end(*started)
            filler.unlink()
            return self._trials.judge(ended, 1, ("error: ", "No space left on device; make room"))
        finally:
            subprocess.run(["umount", "-l", str(workdir)], check=False)

    def _damaged(self, damage: Callable[[Path], None]) -> Verdict:
        """The newest of two checkpoints of a killed run is damaged."""
        killed = self._trials.folder / "two checkpoints"
        if not killed.exists():
            last = Fault("writing the policy", 1, "kill")
            self._trials.end(*self._trials.start(last, killed))
        workdir = self._trials.folder / damage.__name__
        shutil.copytree(killed, workdir)
        step = newest(workdir)
        damage(workdir / "checkpoints" / str(step))
        wrong, lost = self._trials.judge(Ended(workdir, -9, "", 6, False), -9)
        set_aside = (workdir / "damaged" / str(step)).exists()
        # It goes on from the one before, two steps earlier.
        return Verdict(wrong if set_aside else (*wrong, "was not set aside"), lost + 2)

    def _two(self) -> Verdict:
        """A second run is started while a first one is in a step."""
        trials = self._trials
        first = trials.start(Fault("updating", 5, "pause"))
        _wait_for(first[0].with_name(first[0].name + ".files") / "paused")
        log = first[0].with_name(first[0].name + ".log")
        second = trials.end(*trials.start(Fault("updating", 99, "kill"), first[0]))
        wrong = () if second.status == 2 else (f"the second ended with {second.status}",)
        told = f"process {first[1].pid} on {platform.node()} is at work there"
        wrong += () if told in log.read_text() else ("the second did not say who is at work",)
        (first[0].with_name(first[0].name + ".files") / "go on").touch()
        ended = trials.end(*first)
        verdict = trials.judge(ended, 0)
        return Verdict(verdict.wrong + wrong, verdict.lost)


class NotTried(Exception):  # noqa: N818
    """A fault that cannot be made on this machine."""


def _wait_for(path: Path, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.02)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Tries faults.")
    parser.add_argument("--only", default="", help="rows with one of these parts of names: a,b")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    given = parser.parse_args()
    logging.getLogger("emor3_jax").setLevel(logging.ERROR)
    started, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder) / "faults")
        with contextlib.redirect_stdout(io.StringIO()):
            trials.leave_alone()
        print("| fault | tried | survived | steps taken again |\n|---|---:|---:|---|", flush=True)
        table = Table(trials, given.seed)
        rows = [
            row for row in table.rows() if any(part in row.name for part in given.only.split(","))
        ]
        for row, tries in [(row, table.begin(row)) for row in rows]:
            failed += _print_row(row.name, tries)
    took = time.monotonic() - started
    print(f"\n{os.cpu_count()} cores, {date.today()}, {took:.0f} s, seed {given.seed}")
    raise SystemExit(failed > 0)


def _print_row(name: str, tries: list[Callable[[], Verdict]]) -> int:
    """Tries one kind of fault; returns how many runs did not survive it."""
    verdicts = []
    for each in tries:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                verdicts.append(each())
        except NotTried as reason:
            print(f"| {name} | 0 | | {reason} |", flush=True)
            return 0
    lost = [verdict.lost for verdict in verdicts]
    survived = sum(not verdict.wrong for verdict in verdicts)
    span = f"{min(lost)} to {max(lost)}" if min(lost) != max(lost) else f"{lost[0]}"
    print(f"| {name} | {len(verdicts)} | {survived} | {span} |", flush=True)
    for verdict in verdicts:
        if verdict.wrong:
            print(f"<!-- {'; '.join(verdict.wrong)} -->", flush=True)
    return len(verdicts) - survived
