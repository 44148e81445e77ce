"""Whole steps of EMO-R3 on an accelerator, through the program that users run.

    python -m benchmarks.whole_step [--size=half|small] [--tiny]

1. agreement: a step of supervised fine-tuning on given labels, here in bfloat16 with the
   platform's own attention, and on the CPU in float32. Nothing is sampled, so loss and gradient
   norm are equal but for the rounding of bfloat16.
2. step: three steps of EMO-R3 with both reflections, packing and the reference, on a policy of
   random weights with the decoder of Qwen2.5-0.5B. Such a policy's responses all score 0, so the
   share of vowels in them is rewarded too: the gradient is not 0. All metrics are finite; shown are
   the seconds of each phase of the last step, tokens a second, model FLOP/s, padding and memory.

Rows of a table, each as soon as it is known. `--tiny` takes the least sizes, for a machine without
an accelerator.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import small_policy

TOLERANCE = 0.03
"""Relative distance of loss and gradient norm that bfloat16's three digits may make."""

_SHOWN = ("time/", "throughput/", "padding/", "memory/", "rollout/lanes")
"""Metrics of a step that are shown, by how their names begin."""


CONFIG = """from configs import gpu
from emor3_jax.config import reward_term


def get_config():
    config = gpu.get_config("gpus=1,memory=141")
    config.reward.terms.vowels = reward_term(
        weight=1.0, text="benchmarks.whole_step:share_of_vowels"
    )
    return config
"""
"""The config of both stages."""


def share_of_vowels(text: str, answer: str) -> float:
    """Returns the share of vowels among the characters of a response, in [0, 1]."""
    del answer
    return sum(letter in "aeiou" for letter in text) / max(len(text), 1)


def row(*cells: str) -> None:
    """Prints a row of the table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def flags(folder: Path, workdir: str, **fields: Any) -> list[str]:
    """Returns the arguments of a run of some steps that neither evaluates nor saves."""
    rows = folder / "rows.parquet"
    fixed = {
        "policy.path": folder / "policy",
        "data.train.path": rows,
        # Two rows, since a run evaluates at its end.
        "evaluate.sets.validation.path": folder / "two.parquet",
        "evaluate.every": 1000,
        "checkpoint.every": 1000,
        "data.workers": 0,
        "mesh.fsdp": 1,
    }
    given = [f"--config.{name}={value}" for name, value in (fixed | fields).items()]
    (folder / "config.py").write_text(CONFIG)
    return [f"--config={folder / 'config.py'}", f"--workdir={folder / workdir}", *given]


def run(program: str, arguments: list[str], platform: str = "") -> list[dict[str, float]]:
    """Runs a program in a process of its own; returns its metrics, step by step.

    Raises:
      RuntimeError: with the end of its output, if it failed.
    """
    environment = dict(os.environ) | ({"JAX_PLATFORMS": platform} if platform else {})
    command = [sys.executable, "-m", f"emor3_jax.{program}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program}: {(done.stderr or done.stdout)[-1500:]}")
    workdir = next(x for x in arguments if x.startswith("--workdir=")).partition("=")[2]
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [x for x in found if "policy/grad_norm" in x]


def sizes(tiny: bool) -> dict[str, Any]:
    """Returns the fields of both stages."""
    tokens = 16 if tiny else 512
    return {
        "data.prompt_lengths": (512,),
        "data.image_windows": (16,),
        "data.min_pixels": 56 * 56,
        "data.max_pixels": 224 * 224,
        "rollout.prompts": 4 if tiny else 32,
        "rollout.responses": 2 if tiny else 8,
        "rollout.max_tokens": tokens,
        "rollout.slots": 2 if tiny else 16,
        "rollout.refill": 2 if tiny else 8,
        "rollout.block": min(64, tokens),
        "reflect.text_lengths": (tokens,),
        "policy_update.prompts": 2 if tiny else 16,
        "policy_update.micro_prompts": 2 if tiny else 4,
        "policy_update.response_lengths": (tokens,),
        "evaluate.prompts": 2,
    }


def agreement(folder: Path, tiny: bool) -> bool:
    """Compares a step here with one on the CPU in float32; returns whether they agree."""
    given = sizes(tiny) | {"steps": 1, "rollout.prompts": 4, "policy_update.prompts": 4}
    given |= {"policy_update.micro_prompts": 2, "sft.target": "label"}
    here = run("sft", flags(folder, "here", **given, **{"policy.dtype": "bfloat16"}))[-1]
    cpu = run("sft", flags(folder, "cpu", **given, **{"policy.dtype": "float32"}), "cpu")[-1]
    agrees = True
    for name in ("policy/loss", "policy/grad_norm"):
        distance = abs(here[name] - cpu[name]) / abs(cpu[name])
        agrees &= distance <= TOLERANCE
        row("agreement", name, f"{here[name]:.5g} here, {cpu[name]:.5g} on CPU: {distance:.2%}")
    return agrees


def step(folder: Path, tiny: bool) -> bool:
    """Takes steps of EMO-R3; returns whether all metrics are finite."""
    started = time.perf_counter()
    found = run("train", flags(folder, "train", **sizes(tiny) | {"steps": 3}))
    row("step", "three steps with start and compiling", f"{time.perf_counter() - started:.1f} s")
    wrong = sorted({name for x in found for name, value in x.items() if not math.isfinite(value)})
    row("step", "metrics that are not finite", ", ".join(wrong) or "none")
    for name, value in found[-1].items():
        if name.startswith(_SHOWN) or name in ("policy/loss", "policy/grad_norm"):
            row("step", name, f"{value:.5g}")
    still = all(x["policy/grad_norm"] == 0 for x in found)
    if still:
        row("step", "gradient", "0 in all steps: nothing was learned from")
    return not wrong and not still and len(found) == 3


def main(argv: list[str] | None = None) -> int:
    """Runs both stages; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="half", choices=("half", "small"))
    parser.add_argument("--tiny", action="store_true", help="the least sizes")
    options = parser.parse_args(argv)
    failed = False
    row("stage", "measure", "value")
    row("---", "---", "---")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        side = 56 if options.tiny else 224
        small_policy.write_rows(folder / "rows.parquet", side, 64)
        small_policy.write_rows(folder / "two.parquet", side, 2, seed=1)
        for stage, size in ((agreement, "small"), (step, options.size)):
            changes = small_policy.HALF_BILLION if size == "half" else None
            count = small_policy.write_policy(folder / "policy", changes=changes)
            row(stage.__name__, "parameters", f"{count:,}")
            try:
                failed |= not stage(folder, options.tiny)
            except Exception as error:
                # Of the other there is still something to learn.
                failed = True
                row(stage.__name__, "failed", " ".join(str(error).split())[-1200:])
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
