"""Tiny runs whose metrics, predictions and final parameters are compared byte for byte.

    python tests/support/golden_runs.py WORKDIR [--write]

runs all of them, with the flags of XLA that tests have, and writes what was found to
`WORKDIR/runs.json`; `--write` writes it to `tests/golden/runs.json` too.

A digest stands for every number of a run: a change of the code that should change no number must
leave it as it is. Digests are comparable between machines of equal processors and equal versions
of jaxlib only, which `machine` names; between others the metrics are, up to rounding.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from ml_collections import ConfigDict

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import compiler_flags  # noqa: E402

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Read when JAX looks for its devices.
    os.environ["XLA_FLAGS"] = compiler_flags.FAST

from emor3_jax import sft, train  # noqa: E402
from emor3_jax.config import reward_term  # noqa: E402
from emor3_jax.models import load  # noqa: E402
from support import tiny_run  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "runs.json"

MEASURED = ("time/", "throughput/", "memory/", "compile/")
"""Metrics that differ from run to run."""

ADDED_METRICS = re.compile(
    r"^(eval/.*/(uar|lenient_accuracy|polarity_accuracy|wheel_distance)"
    r"|policy/(sampler_(gap_max|ess)|empty))$"
)
ADDED_FIELDS = ("lenient", "confidence")
"""Metrics, and fields of predictions, that are younger than the digests and not part of them."""


def emor3(config: ConfigDict) -> None:
    """The method, with evaluations at 2 and 4 and a checkpoint at 3."""
    config.steps, config.checkpoint.every = 5, 3


def supervised(config: ConfigDict) -> None:
    """Supervised fine-tuning on the labels."""
    config.sft.target = "label"


def resample_remax(config: ConfigDict) -> None:
    """Dynamic sampling, and the baseline of ReMax."""
    config.rollout.resample = 2
    config.policy_update.advantage = "remax"


def lora(config: ConfigDict) -> None:
    """Adapters in the decoder and in the vision tower."""
    config.policy.lora_rank = 2
    config.policy.lora_modules = ("q_proj", "v_proj", "visual/qkv")


def adaptive_kl(config: ConfigDict) -> None:
    """A coefficient of the KL that follows its target, in the reward."""
    config.policy_update.kl_place = "reward"
    config.policy_update.kl_target = 1e-4
    config.policy_update.kl_horizon = 100.0


def refill(config: ConfigDict) -> None:
    """Continuous batching, reflection probabilities, recomputed logprobs, an averaged reference."""
    config.profile = "release"
    config.rollout.slots, config.rollout.refill, config.rollout.block = 2, 1, 4
    config.reflect.soft = True
    config.policy_update.old_logprobs = "recompute"
    config.policy_update.surrogate, config.policy_update.mean = "gspo", "seq"
    config.policy_update.clip_low = config.policy_update.clip_high = 0.01
    config.reference.kind, config.reference.decay = "average", 0.5
    config.policy.freeze_vision_tower = True
    config.reference.image_cache = 2**20


RUNS: dict[str, tuple[Callable, Callable[[ConfigDict], None]]] = {
    "emor3": (train.train, emor3),
    "sft": (sft.train, supervised),
    "resample_remax": (train.train, resample_remax),
    "lora": (train.train, lora),
    "adaptive_kl": (train.train, adaptive_kl),
    "refill": (train.train, refill),
}
"""Name → program, and the changes to the config of `tiny_run`."""


def make_config(folder: Path) -> ConfigDict:
    """Returns the config of `tiny_run` with custom reward terms that tell responses apart."""
    config = tiny_run.make_config(folder)
    config.reward.terms.brief = reward_term(weight=-0.2, pattern=r"^.{0,20}$")
    config.reward.terms.length = reward_term(
        weight=0.5, function="support.tiny_run:share_of_length"
    )
    config.reward.terms.letters = reward_term(weight=0.02, text="support.tiny_run:letters")
    return config


def machine() -> str:
    """Returns a digest of all that decides how XLA rounds on a CPU."""
    processor = Path("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:.*$", processor.read_text(), re.M)
    cpu = flags and " ".join(sorted(flags[0].split()))
    known = jaxlib.__version__, os.cpu_count(), cpu, compiler_flags.FAST
    return hashlib.sha256(repr(known).encode()).hexdigest()


def metrics_of(workdir: Path) -> list[dict[str, float]]:
    """Returns the metrics of each step but those that differ from run to run."""
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(MEASURED) and not ADDED_METRICS.match(name)
        }
        for row in tiny_run.read_metrics(workdir)
    ]


def digest(workdir: Path) -> dict[str, str]:
    """Returns the digests of a run: metrics, predictions and final parameters."""
    lines = metrics_of(workdir)
    predictions = hashlib.sha256()
    for file in sorted((workdir / "predictions").rglob("*.jsonl")):
        predictions.update(str(file.relative_to(workdir)).encode())
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            kept = {name: value for name, value in row.items() if name not in ADDED_FIELDS}
            predictions.update(json.dumps(kept, ensure_ascii=False).encode() + b"\n")
    params = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(load(workdir / "policy").params)[0]:
        params.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    metrics = json.dumps(lines, sort_keys=True).encode()
    return {
        "metrics": hashlib.sha256(metrics).hexdigest(),
        "predictions": predictions.hexdigest(),
        "params": params.hexdigest(),
    }


def run_all(folder: Path) -> dict[str, Any]:
    """Returns the machine, and name → digests and last metrics of all runs, a resumed one too."""
    tiny_run.make_folder(folder)
    found: dict[str, Any] = {}
    for name, (program, change) in RUNS.items():
        config = make_config(folder)
        change(config)
        program(config, folder / name)
        found[name] = digest(folder / name) | {"last": metrics_of(folder / name)[-1]}
    # From the checkpoint of step 3 on, as after a stop.
    config, resumed = make_config(folder), folder / "resumed"
    emor3(config)
    shutil.copytree(folder / "emor3", resumed)
    shutil.rmtree(resumed / "policy")
    shutil.rmtree(resumed / "checkpoints" / "5")
    train.train(config, resumed)
    found["emor3 resumed"] = digest(resumed) | {"last": metrics_of(resumed)[-1]}
    return {"machine": machine(), "runs": found}


if __name__ == "__main__":
    found = json.dumps(run_all(Path(sys.argv[1])), indent=1) + "\n"
    (Path(sys.argv[1]) / "runs.json").write_text(found)
    if sys.argv[2:] == ["--write"]:
        GOLDEN.write_text(found)
