"""The page of the compiler's table, from results that are given."""

from typing import Any

from benchmarks.compile_matrix import page


def _row(name: str, moved: dict[str, int], fits: bool) -> dict[str, Any]:
    return {
        "name": name,
        "date": "2026-11-25",
        "commit": "0123456789",
        "devices": 8,
        "mesh": {"data": 1, "fsdp": -1, "tensor": 2},
        "rollout": {"slots": 32},
        "micro_prompts": 4,
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
