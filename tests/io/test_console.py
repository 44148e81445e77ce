"""Lines and bars of a run: bars on a terminal alone, and nothing that ends a run."""

import errno
import io
import sys

import pytest

from emor3_jax.io import console
from emor3_jax.io.console import Console


class _Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def _on_screen(monkeypatch: pytest.MonkeyPatch, **variables: str) -> _Screen:
    """Makes a terminal standard output; in the test itself, since pytest takes it before."""
    for name, value in ({"TERM": "xterm", "COLUMNS": "100"} | variables).items():
        monkeypatch.setenv(name, value)
    screen = _Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    return screen


def _follow(say: Console) -> None:
    with say.task("training", 20, "steps", 3) as task:
        task.advance()
        task.note("rollout")
        with say.task("scenes", 800, "rows") as rows:
            rows.advance(200)
            say("a [line] of 3")
    task.note("too late")
    task.advance()


def test_without_a_terminal_there_are_lines_alone(capsys: pytest.CaptureFixture[str]) -> None:
    say = Console("train")
    _follow(say)
    assert say.width is None
    say.block("a\nb")
    heads = ("a [line] of 3", "a", "b")
    assert capsys.readouterr().out == "".join(f"[train 00:00] {line}\n" for line in heads)


def test_a_terminal_has_bars_below_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _on_screen(monkeypatch)
    say = Console("train")
    assert say.width == 100 - len("[train 00:00] ")
    _follow(say)
    shown = screen.getvalue()
    assert "[train 00:00] a [line] of 3\n" in shown and "too late" not in shown
    say.block("a\nb")
    assert screen.getvalue().endswith("a\nb\n")
    assert " 4/20 " in shown and "steps" in shown and "rollout" in shown
    assert "200/800" in shown and "rows" in shown
    # The cursor stays, and standard output is given back.
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l") and sys.stdout is screen


def test_a_terminal_that_knows_no_control_codes_has_lines_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = _on_screen(monkeypatch, TERM="dumb")
    _follow(Console("train"))
    assert screen.getvalue() == "[train 00:00] a [line] of 3\n"


def test_a_terminal_that_is_gone_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _on_screen(monkeypatch)
    say = Console("train")

    def write(_: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(screen, "write", write)
    _follow(say)
    console.tell("nobody hears it")
