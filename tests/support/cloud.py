"""Programs that stand in for gcloud, git, gcsfuse and the like: they note how they were called."""

import os
import subprocess
from pathlib import Path

import emor3_jax

ROOT = Path(emor3_jax.__file__).parents[1]

COMMIT = "0123abc"
"""What git says is checked out."""

_NOTE = """#!/usr/bin/env bash
# In one piece, as programs of a pipe note theirs at the same time: the shell writes up to each end
# of a line at once, so that none must stand in it.
printf '%s\\0' "$(basename "$0")" "$@" $'\\x1e' >> "$CALLS"
"""

# Takes the next line of a file of answers; the last one stays.
_GCLOUD = """
next() {
  local line
  line="$(head -n 1 "$1")"
  if [[ "$(wc -l < "$1")" -gt 1 ]]; then sed -i 1d "$1"; fi
  echo "$line"
}
case "$*" in
  *" describe "*)
    state="$(next "$ANSWERS/tpu")"
    case "$state" in
      ABSENT) echo "ERROR: (gcloud.compute.tpus) NOT_FOUND: no such resource" >&2; exit 1 ;;
      OFFLINE) echo "ERROR: no network" >&2; exit 1 ;;
    esac
    echo "$state" ;;
  *"worker.sh state"*)
    state="$(next "$ANSWERS/run")"
    [[ "$state" != unreachable ]] || exit 255
    echo "a banner"
    echo "run: $state" ;;
  *)
    if [[ -e "$ANSWERS/fail" ]] && grep -qF -- "$(cat "$ANSWERS/fail")" <<< "$*"; then exit 1; fi ;;
esac
"""


class StandIns:
    """A folder of such programs, in front of the others on the path."""

    def __init__(self, folder: Path) -> None:
        self._calls, self._answers = folder / "calls", folder / "answers"
        self._answers.mkdir()
        self._programs = folder / "programs"
        self._programs.mkdir()
        self.home = folder / "home"
        self.home.mkdir()
        self.add("gcloud", _GCLOUD)
        self.add("git", f'[[ "$*" != *rev-parse* ]] || echo {COMMIT}')

    def add(self, name: str, script: str = "") -> None:
        """Adds a program that notes its call and then runs a script."""
        path = self._programs / name
        path.write_text(_NOTE + script)
        path.chmod(0o755)

    def answer(self, question: str, *answers: str) -> None:
        """Says what gcloud tells of the "tpu" or the "run" in turn, or which calls "fail"."""
        (self._answers / question).write_text("".join(f"{each}\n" for each in answers))

    @property
    def environment(self) -> dict[str, str]:
        """The environment of what runs with the stand-ins."""
        return os.environ | {
            "PATH": f"{self._programs}:{os.environ['PATH']}",
            "CALLS": str(self._calls),
            "ANSWERS": str(self._answers),
            "HOME": str(self.home),
        }

    def run(self, script: str | Path, *arguments: str) -> subprocess.CompletedProcess:
        """Runs a script of `tpu/`, by name, or one at a path."""
        path = ROOT / "tpu" / f"{script}.sh" if isinstance(script, str) else script
        command = ["bash", str(path), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment, timeout=60
        )

    def calls(self) -> list[list[str]]:
        """Returns and forgets the calls so far, each in words."""
        if not self._calls.exists():
            return []
        words, out = self._calls.read_text().split("\0")[:-1], [[]]
        self._calls.unlink()
        for word in words:
            if word == "\x1e":
                out.append([])
            else:
                out[-1].append(word)
        return out[:-1]
