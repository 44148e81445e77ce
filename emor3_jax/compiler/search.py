"""The largest micro-batch and the most slots that fit, found by compiling."""

from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from emor3_jax.compiler.verdict import LEARNING
from emor3_jax.rewards.questions import QUESTIONS

_CACHED = ("open_flight", "resize_ring", "decode", "shrink", "shrink_slots", "take_out", "admit")
"""Programs whose own memory grows with slots and lanes; they compile in seconds."""

_BESIDE = ("prefill", *QUESTIONS)
"""Programs that run beside the cache and depend on `rollout.refill` alone; compiled once."""


def search(config: ConfigDict, topology: str, compile_config: Callable[..., Any]) -> Iterator[str]:
    """Finds `policy_update.micro_prompts` and `rollout.slots`; `rollout.refill` stays.

    `rollout.lanes`, where it is not 0, keeps its share of the slots.

    From what the config says, doubled while it fits or halved until it does. Where the config's
    rules refuse a half, the next smaller size that they allow is tried.

    Args:
      config: of the run; changed to what was found.
      topology: name of the slices.
      compile_config: of the program.

    Yields:
      Lines that tell what was tried, and at last what fits.
    """
    update, rollout = config.policy_update, config.rollout
    rollout.slots = min(rollout.slots or rollout.prompts, rollout.prompts)
    rollout.refill = min(rollout.refill or rollout.slots, rollout.slots)
    found: dict[str, int | None] = {}
    lanes, of_slots = rollout.lanes, rollout.slots

    first = compile_config(config, topology, _BESIDE)
    usable = first.topology.chip.usable
    beside = {r.name: r.needed - r.resident["cache"] for r in first.reports}

    def lanes_of(slots: int) -> int:
        share = slots * lanes // of_slots // first.parts * first.parts
        # 0 would be a lane for every response.
        return max(share, first.parts) if lanes else 0

    def slots_fit(slots: int) -> bool:
        rollout.slots, rollout.lanes = slots, lanes_of(slots)
        tried = compile_config(config, topology, _CACHED)
        cache = max(r.resident["cache"] for r in tried.reports if r.name != "resize_ring")
        needed = [r.needed if r.made is not None else usable + 1 for r in tried.reports]
        return max(*needed, *(x + cache for x in beside.values())) <= usable

    def micro_fits(micro: int) -> bool:
        update.micro_prompts = micro
        return compile_config(config, topology, LEARNING).fits

    # What `checks` and `check_batch` allow; the size that the config begins with they have passed.
    def slots_allowed(slots: int) -> bool:
        return rollout.refill <= slots <= rollout.prompts and slots % rollout.refill == 0

    def micro_allowed(micro: int) -> bool:
        return micro >= first.parts and not (micro % first.parts or update.prompts % micro)

    for field, section, fits, allowed in (
        ("rollout.slots", rollout, slots_fit, slots_allowed),
        ("policy_update.micro_prompts", update, micro_fits, micro_allowed),
    ):
        key = field.split(".")[1]
        value, best, tried = section[key], None, set()
        while allowed(value) and value not in tried:
            tried.add(value)
            good = fits(value)
            yield f"{field}={value}: {'fits' if good else 'does not fit'}"
            best = max(best or 0, value) if good else best
            smaller = (size for size in range(value // 2, 0, -1) if allowed(size))
            value = 2 * value if good else next(smaller, 0)
        section[key] = best or min(tried)
        rollout.lanes = lanes_of(rollout.slots)
        found[field] = best
        if best is None:
            yield f"{field}: nothing fits, down to {min(tried)}"
    if None not in found.values():
        found |= {"rollout.lanes": rollout.lanes} if lanes else {}
        flags = " ".join(f"--config.{field}={value}" for field, value in found.items())
        yield f"largest that fits: {flags}"
