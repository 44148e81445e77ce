"""The table, the verdict, what it advises, and the search, on reports made by hand."""

from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict
from support import tiny

from emor3_jax.compiler.record import Report
from emor3_jax.compiler.search import search
from emor3_jax.compiler.verdict import table, verdict
from emor3_jax.config import default
from emor3_jax.flops import Cost
from emor3_jax.prepare.checks import validate

GIB = 2**30


def report(name: str, needed: float, made: float | None = 1.0, cache: float = 0.0) -> Report:
    rest = needed - (made or 0) - cache
    resident = {"parameters": rest, "optimizer": 0, "cache": cache, "data": 0}
    resident = {kind: int(size * GIB) for kind, size in resident.items()}
    size = None if made is None else int(made * GIB)
    return Report(name, 3, resident, size, int(needed * GIB), {"all-gather": GIB // 2}, 1.0, 2.0)


def test_the_table_has_sizes_arithmetic_and_what_does_not_fit() -> None:
    costs = {"decode": Cost(linear=6e12, attention=2e12)}
    costs |= {phase: Cost() for phase in ("vision", "prefill", "update")}
    reports = [report("decode", 5.0), report("update", 9.0, made=None)]
    lines = table(reports, costs, devices=4, usable=6 * GIB).splitlines()
    assert lines[2] == (
        "| decode | 3 | 4.00 | 0.00 | 0.00 | 0.00 | 1.00 | 5.00 | 2.0 | 0.5 |  |  |  |  | 3 s |"
    )
    assert lines[3].startswith("| update | 3 | 9.00 | 0.00 | 0.00 | 0.00 | ? | 9.00 **no** |")


def test_a_step_that_fits_names_the_largest_program() -> None:
    said = verdict(
        [report("decode", 5.0), report("update", 5.5)],
        default(),
        tiny.make_policy().shapes,
        4,
        6 * GIB,
        2,
    )
    assert said == "fits: at most 5.50 of 6.00 GiB a device are needed (update)"


def test_some_programs_that_fit_are_not_the_whole_step() -> None:
    shapes = tiny.make_policy().shapes
    said = verdict([report("decode", 5.0)], default(), shapes, 4, 6 * GIB, 30)
    assert said.startswith("fits, as far as compiled (1 of 30 programs): at most 5.00 of 6.00 GiB")


@pytest.mark.parametrize(
    ("name", "change", "advice", "not_advised"),
    [
        ("update", {"micro_prompts": 8}, "policy_update.micro_prompts=8", "rollout.slots"),
        ("update", {"remat": "none"}, "policy_update.remat='none'", "rollout.refill"),
        ("decode", {}, "rollout.slots=512", "micro_prompts"),
        ("prefill", {}, "rollout.refill=512", "micro_prompts"),
        ("evaluate.decode", {}, "evaluate.prompts=64", "rollout.slots"),
    ],
)
def test_what_does_not_fit_is_told_what_to_change(
    name: str, change: dict, advice: str, not_advised: str
) -> None:
    config = default()
    config.policy_update.update(change)
    over = [report(name, 7.0, cache=2.0), report("spans", 3.0)]
    said = verdict(over, config, tiny.make_policy().shapes, 4, 6 * GIB, 2)
    assert said.startswith(f"does not fit: {name} needs 7.00 of 6.00 GiB a device\n")
    assert f"  change {advice}" in said and not_advised not in said
    assert ("change mesh.tensor=1: 2" in said) == (name != "update")
    assert "spans" not in said and "or more devices" in said


def test_a_single_device_is_not_told_to_share_matrices() -> None:
    over = [report("decode", 7.0, cache=2.0)]
    said = verdict(over, default(), tiny.make_policy().shapes, 1, 6 * GIB, 1)
    assert "rollout.slots" in said and "mesh.tensor" not in said


def test_advice_stands_under_the_program_that_is_over() -> None:
    config = default()
    over = [report("update", 8.0), report("decode", 7.0, cache=3.0)]
    said = verdict(over, config, tiny.make_policy().shapes, 4, 6 * GIB, 2).splitlines()
    first, second = (said.index(next(x for x in said if f": {n} needs" in x)) for n in UPDATED)
    assert any("policy_update.micro_prompts" in line for line in said[first:second])
    assert any("rollout.slots" in line for line in said[second:])


UPDATED = ("update", "decode")


def test_a_large_optimizer_is_told_of_adapters_and_many_images_of_fewer_prompts() -> None:
    resident = {"parameters": 0, "optimizer": 4 * GIB, "cache": 0, "data": 3 * GIB}
    found = Report("weight_sync", 1, resident, 0, 7 * GIB)
    config = default()
    said = verdict([found], config, tiny.make_policy().shapes, 4, 6 * GIB, 1)
    assert "change policy.lora_rank=0: adapters, such as 64, spare most of 4.00 GiB" in said
    assert "change rollout.prompts=512: fewer images at once: 3.00 GiB are data" in said
    config.policy.lora_rank = 64
    assert "lora" not in verdict([found], config, tiny.make_policy().shapes, 4, 6 * GIB, 1)


def searched(config: ConfigDict) -> list[str]:
    """Searches where of 20 GiB the rollout takes 10 and 0.1 a slot, the update 5 and 1 a prompt."""

    def compile_config(config, topology, only):
        validate(config)
        for size in (config.rollout.slots, config.policy_update.micro_prompts):
            assert size % 4 == 0
        cache = 0.1 * config.rollout.slots
        needed = {
            "decode": 4 + cache,
            "coherence": 10 + cache,
            "update": 5 + config.policy_update.micro_prompts,
        }
        reports = [report(n, x, cache=cache) for n, x in needed.items() if n in only]
        chip = SimpleNamespace(usable=20 * GIB)
        return SimpleNamespace(
            reports=reports,
            topology=SimpleNamespace(chip=chip),
            parts=4,
            fits=all(r.fits(chip.usable) for r in reports),
        )

    return list(search(config, "v4-8", compile_config))


@pytest.mark.parametrize("start", [8, 64, 256])
def test_the_search_finds_the_largest_that_fit(start: int) -> None:
    config = default()
    config.rollout.slots, config.rollout.refill = start, 8
    config.policy_update.micro_prompts = min(start, 128)
    # 10 + 6.4 fits beside the reflections, 10 + 12.8 does not.
    assert searched(config)[-1] == (
        "largest that fits: --config.rollout.slots=64 --config.policy_update.micro_prompts=8"
    )


def test_the_search_never_comes_to_no_lanes_which_would_be_all() -> None:
    config = default()
    config.rollout.slots, config.rollout.refill, config.rollout.lanes = 256, 8, 4
    config.policy_update.micro_prompts = 8
    # A quarter of the slots have less than a lane for each of 4 parts.
    assert "--config.rollout.slots=64 " in searched(config)[-1]
    assert searched(config)[-1].endswith("--config.rollout.lanes=4")


def test_the_search_tries_no_size_that_the_rules_refuse() -> None:
    config = default()
    config.rollout.prompts, config.policy_update.prompts = 240, 120
    config.rollout.slots, config.rollout.refill = 240, 16
    config.policy_update.micro_prompts = 60
    assert searched(config) == [
        "rollout.slots=240: does not fit",
        # Not 120 or 56, which are no multiples of 16.
        "rollout.slots=112: does not fit",
        "rollout.slots=48: fits",
        "rollout.slots=96: fits",
        "rollout.slots=192: does not fit",
        "policy_update.micro_prompts=60: does not fit",
        # Not 30, which does not divide over 4 parts, nor 28 or 16, which do not divide 120.
        "policy_update.micro_prompts=24: does not fit",
        "policy_update.micro_prompts=12: fits",
        "largest that fits: --config.rollout.slots=96 --config.policy_update.micro_prompts=12",
    ]


def test_the_search_says_that_nothing_fits() -> None:
    config = default()
    config.rollout.slots = config.rollout.refill = 128
    config.policy_update.micro_prompts = 8
    assert searched(config)[:2] == [
        "rollout.slots=128: does not fit",
        "rollout.slots: nothing fits, down to 128",
    ]
