"""The page of the compiler's table, from results that are given."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compile_matrix
from benchmarks.compile_matrix import PROGRAMS, config_of, page

_NOW = config_of("3b", "v4-16")


def _row(name: str, moved: dict[str, int], fits: bool) -> dict[str, Any]:
    return {
        "name": name,
        "date": "2026-11-25",
        "commit": "0123456789",
        "devices": 8,
        "mesh": _NOW.mesh.to_dict(),
        "rollout": {x: _NOW.rollout[x] for x in ("prompts", "slots", "refill", "lanes")},
        "micro_prompts": _NOW.policy_update.micro_prompts,
        "usable": 16 * 2**30,
        "needed": 20 * 2**30,
        "fits": fits,
        "moved": moved,
        "calls": 2,
        "flops_a_step": 3e12,
    }


def test_the_page_says_when_and_from_what_its_programs_were_compiled() -> None:
    older = _row("update", {}, True) | {"date": "2026-11-24", "commit": "fedcba9876"}
    text = page({("3b", "v4-16"): {"update": older, "decode": _row("decode", {}, True)}})
    found = "2 programs, compiled 2026-11-24 to 2026-11-25 at 0123456789, fedcba9876"
    assert found in " ".join(text.split())


def test_a_page_of_nothing_says_so() -> None:
    text = page({})
    assert "No program has been compiled" in text
    assert "Not run of 3B: v4-8, v4-16" in text and "| 3B |" not in text


def test_a_program_of_other_sizes_than_its_config_has_today_is_marked() -> None:
    rows = {name: _row(name, {}, True) for name in PROGRAMS}
    assert _fit(rows).endswith("| fits |") and "| *20.0* |" not in _fit(rows)
    # As before there were lanes: a quarter of the slots, each with a lane for every response.
    slots = {"prompts": 512, "slots": _NOW.rollout.slots // 4, "refill": _NOW.rollout.refill}
    changed = "decode", "update", "update_packed", "apply", "weight_sync"
    older = rows | {x: rows[x] | {"rollout": slots} for x in changed}
    # Updates and weight sync have no slots.
    assert _fit(older).count("| *20.0* |") == 1
    assert _fit(older).endswith("| fits, in part by older sizes |")
    assert f"| {_NOW.rollout.slots} | {_NOW.rollout.lanes} |" in _fit(older)
    del older["admit"]
    assert _fit(older).endswith("| fits, in part by older sizes, as far as run |")


def _fit(rows: dict[str, Any]) -> str:
    return next(x for x in page({("3b", "v4-16"): rows}).splitlines() if x.startswith("| 3B |"))


def _lines(update: dict[str, Any], handed: dict[str, Any]) -> list[str]:
    text = page({("3b", "v4-16"): {"update": update, "weight_sync": handed}})
    return [line for line in text.splitlines() if line.startswith("| 3B | v4-16 ")]


def test_traffic_is_that_of_all_calls_and_its_sum_stands_beside_it() -> None:
    gib = 2**30
    update = _row("update", {"all-gather": 3 * gib, "all-reduce": gib // 2}, True)
    fit, traffic = _lines(update, _row("weight_sync", {"all-gather": gib}, True))
    assert "fits, as far as run" in fit
    assert traffic == "| 3B | v4-16 | 8 | 6.0 | 0.0 | 1.0 | 0.0 | 0.0 | 7 | 1.0 | 3 |"


def test_a_refused_program_shows_no_traffic_rather_than_none_moved() -> None:
    fit, traffic = _lines(_row("update", {}, False), _row("weight_sync", {}, False))
    assert "**20.0**" in fit and "does not fit" in fit
    assert traffic == "| 3B | v4-16 | 8 |  |  |  |  |  |  |  | 3 |"


def test_traffic_of_another_mesh_is_marked() -> None:
    update = _row("update", {"all-gather": 3 * 2**30}, True)
    update["mesh"] = update["mesh"] | {"tensor": 8}
    _, traffic = _lines(update, _row("weight_sync", {"all-gather": 2**30}, True))
    assert traffic.startswith("| 3B | v4-16 | 8 | *6.0* |") and traffic.endswith(
        "| *6* | 1.0 | 3 |"
    )


def test_a_program_that_is_compiled_anew_replaces_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "compile.jsonl"
    monkeypatch.setattr(compile_matrix, "RESULTS", results)
    rows = [{"size": "3b", "topology": "v4-8", "name": name, "date": "1"} for name in ("a", "b")]
    compile_matrix._keep(rows)
    compile_matrix._keep([rows[0] | {"date": "2"}, rows[0] | {"topology": "v4-16"}])
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert found == [rows[1], rows[0] | {"date": "2"}, rows[0] | {"topology": "v4-16"}]
    assert list(tmp_path.iterdir()) == [results]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["v4-9"], "'v4-9': must be one of v4-8, v4-16"),
        (["h100-8"], "'h100-8': must be one of v4-8, v4-16"),
        (["--sizes=9b"], "'9b': must be of 3b, 7b"),
        (["--sizes="], "'': must be of 3b, 7b"),
        (["--only=decode,decod"], "'decod': must be of weight_sync, decode"),
    ],
)
def test_what_no_table_shows_is_refused_before_a_compile(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["compile_matrix", *arguments])
    with pytest.raises(SystemExit) as ended:
        compile_matrix.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_all_is_compiled_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = []
    monkeypatch.setattr("sys.argv", ["compile_matrix"])
    monkeypatch.setattr(compile_matrix, "compile_cell", lambda *cell: cells.append(cell))
    monkeypatch.setattr(compile_matrix, "RESULTS", tmp_path / "compile.jsonl")
    monkeypatch.setattr(compile_matrix, "PAGE", tmp_path / "compile.md")
    compile_matrix.main()
    assert [cell[:2] for cell in cells] == [
        (size, name) for size in compile_matrix.SIZES for name in compile_matrix.SLICES
    ]
    assert all(programs == list(PROGRAMS) for *_, programs in cells)
