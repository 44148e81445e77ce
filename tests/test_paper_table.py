"""The miniature of the paper's table: which cells run, what is kept of them, and the page."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import paper_table as table
from emor3_jax.runtime import cli

GOOD = (
    "<step1> a dog </step1>\n<step2> calm </step2>\n<step3> positive </step3>\n\\boxed{contentment}"
)


def test_a_seed_is_whole_before_the_next_and_a_cold_start_comes_before_its_rows() -> None:
    cells = table.order(table.ROWS, [0, 1])
    assert len(set(cells)) == len(cells) == 2 * len(table.ROWS)
    assert [seed for _, seed in cells] == [0] * len(table.ROWS) + [1] * len(table.ROWS)
    for row in ("grpo_cold", "emo_r3_cold"):
        assert cells.index(("cold_start", 1)) < cells.index((row, 1))
    assert table.order(["emo_r3_cold"], [2]) == [("cold_start", 2), ("emo_r3_cold", 2)]


def test_a_row_with_a_cold_start_begins_with_that_of_its_seed() -> None:
    options = ["--config.policy.path=base", "--config.data.folder=data"]
    [plain] = table.commands("emo_r3", 1, Path("runs"), options)
    [cold] = table.commands("emo_r3_cold", 1, Path("runs"), options)
    assert plain[:2] == cold[:2] == ["emor3_jax.train", "--config=configs/table.py:emo_r3"]
    assert plain[2:] == ["--workdir=runs/emo_r3/1", "--config.seed=1", *options]
    assert cold[2:] == [
        "--workdir=runs/emo_r3_cold/1",
        "--config.seed=1",
        *options,
        # The last one counts.
        "--config.policy.path=runs/cold_start/1/policy",
    ]
    [long] = table.commands("emo_r3_gdpo_judge_long", 0, Path("runs"), [])
    assert long[1] == "--config=configs/table.py:emo_r3_gdpo_judge" and "--config.steps=200" in long
    learn, evaluate = table.commands("cold_start", 1, Path("runs"), [])
    assert learn[:2] == ["emor3_jax.sft", "--config=configs/table.py:cold_start"]
    assert evaluate[:2] == ["emor3_jax.evaluate", "--config=configs/table.py:base"]
    assert evaluate[2] == "--workdir=runs/cold_start/1/asked_for_set"
    assert evaluate[-1] == cold[-1]


@pytest.mark.parametrize(
    ("response", "has"),
    [
        (GOOD, True),
        (GOOD.replace("> ", ">\n\t"), True),
        (f"answer :\n{GOOD}", False),
        (GOOD.replace(" </step2>", ""), False),
        ("\\boxed{contentment}", False),
    ],
)
def test_the_format_of_every_row_is_that_of_set(response: str, has: bool) -> None:
    assert table.has_steps(response) == has


def _write_run(workdir: Path, accuracy: float, steps: int) -> None:
    """Leaves behind what a program that trains does, of two responses on each data set."""
    metrics = {"accuracy": accuracy, "decoupling": 0.25, "response_length": 40.0, "rows": 2.0}
    folder = workdir / "predictions" / f"{steps:06d}"
    folder.mkdir(parents=True)
    for name in table.SETS:
        rows = [
            {"responses": [{"response": GOOD, "answer": "contentment"}]},
            {"responses": [{"response": "\\boxed{contentment}", "answer": "contentment"}]},
            {"responses": [{"response": "contentment", "answer": ""}]},
            {"responses": [{"response": "<step1>", "answer": ""}]},
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = {name: metrics | {"accuracy": 0.1} for name in table.SETS}
    after = {name: metrics for name in table.SETS}
    (workdir / "evaluations.json").write_text(json.dumps([before, after]))
    config = {"steps": steps, "rollout": {"prompts": 32, "responses": 8}}
    (workdir / "config.json").write_text(json.dumps(config))
    logged = [
        {"step": 0, "eval/emoscenes/accuracy": 0.1, "eval/shifted/accuracy": 0.2},
        {"step": 1, "time/step_s": 2.0, "time/rollout_s": 1.0, "resample/rounds": 1.0},
        {
            "step": 2,
            "time/step_s": 3.0,
            "time/rollout_s": 1.0,
            "resample/rounds": 3.0,
            "eval/emoscenes/accuracy": 0.3,
        },
        {"step": 3, "time/step_s": 1.0, "time/rollout_s": 1.0, "resample/rounds": 2.0},
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))


def test_what_is_kept_of_a_run(tmp_path: Path) -> None:
    _write_run(tmp_path, 0.5, steps=3)
    scores = {
        "accuracy": 0.5,
        "boxed": 0.5,
        "set_format": 0.25,
        "decoupling": 0.25,
        "response_length": 40.0,
    }
    assert table.read_cell(tmp_path) == {
        "scores": {"emoscenes": scores, "shifted": scores},
        "curve": [[0, 0.1], [2, 0.3], [3, 0.5]],
        "step_seconds": 6.0,
        "learned": 96,
        # Rounds of 32 images: one, three and two.
        "drawn": 192,
        "responses": 1536,
    }


def _cell(accuracy: float, decoupling: float | None, curve: list) -> dict:
    scores = {"accuracy": accuracy, "response_length": 40.0}
    if decoupling is not None:
        scores["decoupling"] = decoupling
    return {
        "scores": {"emoscenes": scores, "shifted": scores | {"accuracy": accuracy / 2}},
        "curve": curve,
        "step_seconds": 100.0,
        "seconds": 120.0,
        "learned": 1920,
        "drawn": 3200,
        "responses": 25600,
        "date": "2026-01-02",
    }


def _lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_the_page_has_mean_spread_and_each_seed() -> None:
    cells = {
        ("grpo", 0): _cell(0.4, 0.5, [[0, 0.2], [3, 0.4]]),
        ("grpo", 1): _cell(0.5, 0.3, [[0, 0.3], [3, 0.5]]),
        ("grpo", 2): _cell(0.6, 0.4, [[0, 0.4], [3, 0.6]]),
        ("emo_r3", 0): _cell(0.5, 0.1, [[0, 0.2], [3, 0.5]]),
        ("emo_r3", 2): _cell(0.9, 0.2, [[0, 0.2], [3, 0.9]]) | {"seconds": None},
        ("sft", 1): _cell(0.7, None, []),
    }
    text = table.page(cells, [0, 1, 2], "# Title\n\nRead on DATE.\n")
    assert text.startswith("# Title\n\nRead on 2026-01-02.\n")
    # Mean and sample standard deviation of 40, 50, 60, and of 20, 25, 30.
    in_domain, shifted, curve, cost, *seeds = _lines(text, "| GRPO |")
    blank = " – | – | – | – | – |"
    assert in_domain == f"| GRPO | 3 | 50.0 ± 10.0 |{blank} 40.0 ± 10.0 | 40.0 ± 0.0 |"
    assert shifted == f"| GRPO | 3 | 25.0 ± 5.0 |{blank} 40.0 ± 10.0 | 40.0 ± 0.0 |"
    assert curve == "| GRPO | 30.0 | 50.0 |"
    assert cost == "| GRPO | 1,920 | 3,200 | 25,600 | 100 ± 0 | 120 ± 0 |"
    assert seeds[1] == f"| GRPO | 1 | 50.0 |{blank} 30.0 | 40.0 | 25.0 |{blank} 30.0 | 40.0 | 120 |"
    assert _lines(text, "| SFT | 1 | 70.0 | –")
    # Seeds 0 and 2: by 10 and 30 points, half of that out of domain, decoupling by -40 and -20.
    assert _lines(text, "| EMO-R3 − GRPO |") == [
        f"| EMO-R3 − GRPO | **{mean}** ({each}) | – | – | **-30.0** (-40.0, -20.0) |"
        for mean, each in (("+20.0", "+10.0, +30.0"), ("+10.0", "+5.0, +15.0"))
    ]
    assert all("not run" in line for line in _lines(text, "| DAPO"))
    assert _lines(text, "| EMO-R3 | 1 | not run |")
    # Every line of a table has as many columns as its heading.
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| row")]
    assert len(tables) == 7
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1


class Programs:
    """Stands in for the processes; says of each with which status it ends."""

    def __init__(self, statuses: list[int]) -> None:
        self.statuses, self.asked = statuses, []

    def run(self, command: list[str], check: bool) -> subprocess.CompletedProcess:
        workdir = Path(next(x for x in command if x.startswith("--workdir=")).split("=")[1])
        self.asked.append((workdir.parent.name, int(workdir.name)))
        workdir.mkdir(parents=True, exist_ok=True)
        status = self.statuses.pop(0)
        if not status:
            _write_run(workdir, 0.5, steps=3)
        return subprocess.CompletedProcess(command, status)


def _main(monkeypatch, folder: Path, statuses: list[int], *arguments: str) -> Programs:
    programs = Programs(statuses)
    monkeypatch.setattr(table.subprocess, "run", programs.run)
    monkeypatch.setattr(table, "PAGE", folder / "page.md")
    monkeypatch.setattr(table, "NOTES", folder / "notes.md")
    (folder / "notes.md").write_text("# Title")
    monkeypatch.setattr(sys, "argv", ["paper_table", f"--folder={folder / 'cells'}", *arguments])
    table.main()
    return programs


@pytest.mark.parametrize("status", [cli.STOPPED, -signal.SIGTERM, cli.INTERRUPTED])
def test_finished_cells_are_not_run_again_and_a_stopped_one_is(
    monkeypatch, tmp_path, status: int
) -> None:
    chosen = "--rows", "grpo", "emo_r3", "--seeds", "0", "1"
    with pytest.raises(SystemExit) as stopped:
        _main(monkeypatch, tmp_path, [0, status], *chosen)
    assert stopped.value.code == cli.STOPPED
    assert set(table.load(tmp_path / "cells")) == {("grpo", 0)}
    assert "| EMO-R3 | 0 | not run |" in (tmp_path / "page.md").read_text()

    programs = _main(monkeypatch, tmp_path, [0, 0, 0], *chosen)
    assert programs.asked == [("emo_r3", 0), ("grpo", 1), ("emo_r3", 1)]
    cells = table.load(tmp_path / "cells")
    # What a stopped cell took is not known.
    assert [cells[cell]["seconds"] is None for cell in [("grpo", 0), *programs.asked]] == [
        *(False, True, False, False)
    ]
    assert _main(monkeypatch, tmp_path, [], *chosen).asked == []
    assert "| EMO-R3 | 0 | 50.0 |" in (tmp_path / "page.md").read_text()


def test_after_a_failure_the_other_cells_run(monkeypatch, tmp_path) -> None:
    with pytest.raises(SystemExit, match="failed: grpo seed 0"):
        _main(monkeypatch, tmp_path, [1, 0], "--rows", "grpo", "emo_r3", "--seeds", "0")
    assert set(table.load(tmp_path / "cells")) == {("emo_r3", 0)}


def test_the_page_alone_runs_nothing(monkeypatch, tmp_path) -> None:
    assert _main(monkeypatch, tmp_path, [], "--page").asked == []
    assert "not run" in (tmp_path / "page.md").read_text()


def test_only_options_of_the_config_are_passed_on(monkeypatch, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        _main(monkeypatch, tmp_path, [], "--seed=1", "--config.steps=2")
    assert "unknown: --seed=1;" in capsys.readouterr().err
