"""One whole training step beside TRL's GRPOTrainer. python -m benchmarks.step

Both train the same Qwen2.5-VL of 26.5 million parameters (`small_policy`), read from the same
folder, on the same images and questions, and take turns step by step on the same machine. A step
is: sample G responses of exactly T tokens to each of B prompts, score them (format, accuracy and
one regular expression), compare them within their group, score them under the frozen reference,
and take one AdamW step with gradients through decoder and vision tower. There are no reflections,
since TRL has none; a row of its own shows what both cost.

What makes it fair:
* TRL runs at its best (`peer_trl`), and in float32 and in bfloat16; so does `emor3_jax`; the best
  of each are compared. Both have float32 weights and optimizer states in all rows but the one
  called "bfloat16 weights": TRL without master weights, where most of so small an update is lost
  to rounding. It is shown, and does not count as TRL's best.
* Our seconds begin before the batch is taken from the pipeline and end when the metrics have
  reached the host; TRL's begin after its images were read and decoded.
* Responses are random, so format and accuracy are 0; the regular expression matches about half of
  them, so that advantages and gradients are not 0.
* Checked in each run: all responses of both sides have T tokens, losses are finite, and TRL's
  first batch, put into our reference and update, gives the same rewards, advantages,
  log-probabilities, loss and gradient norm (float32).

Huge pages and an allocator that keeps its memory (the Makefile sets them) go to both sides; but for
the single heap, which XLA gains by: torch has those of its own (`peers.MALLOC`).
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import small_policy
from benchmarks.options import whole
from benchmarks.peers import Peer
from emor3_jax import prepare
from emor3_jax.config import default, reward_term
from emor3_jax.data.batch import collate
from emor3_jax.data.encode import encode_row
from emor3_jax.data.labels import label_set
from emor3_jax.data.prompts import PromptTemplates, fill
from emor3_jax.io.console import Console
from emor3_jax.learner.logprobs import planned_logprobs
from emor3_jax.learner.micro_batches import StepPlan
from emor3_jax.parallel.mesh import make_mesh, shard_batch
from emor3_jax.rl import advantages
from emor3_jax.types import Batch, Experience, Samples

RUNS, WARM_UP = 7, 2
TOKENS = 64
PATTERN = "za"
CASES = ((2, 4, 224), (2, 8, 448))
"""Prompts, responses, side of an image."""
PRECISIONS = ("float32", "bfloat16")
PEER_PRECISIONS = ("float32", "bfloat16", "bfloat16 weights")


def make_config(case: tuple[int, int, int], folder: Path, dtype: str, reflect: bool) -> ConfigDict:
    """Returns the config of a run as `emor3_jax.train` takes it."""
    prompts, responses, side = case
    config = default()
    config.policy.path, config.policy.dtype = str(folder / "policy"), dtype
    config.data.train.kind = "parquet"
    config.data.train.path = str(folder / f"{side}.parquet")
    config.data.prompt_lengths, config.data.image_windows = (240, 432), ((side // 112) ** 2,)
    config.rollout.prompts, config.rollout.responses = prompts, responses
    config.rollout.max_tokens = TOKENS
    config.reflect.enabled, config.reflect.text_lengths = reflect, (TOKENS,)
    config.reward.terms.pattern = reward_term(weight=0.5, pattern=PATTERN)
    config.reward.table_cache, config.log.compile_cache = "", ""
    config.policy_update.prompts = config.policy_update.micro_prompts = prompts
    config.policy_update.remat = "none"
    config.rollout.block = TOKENS
    config.policy_update.response_lengths = (TOKENS,)
    return config


class StepClock:
    """Adds up the seconds of named phases, each from the end of the one before.

    Sampling and reflections are one phase, "rollout".

    Attributes:
      spent: phase → seconds.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, phase: str, arrays: Any) -> None:
        """Ends a phase when its arrays are there."""
        if phase == "rollout":
            # The reflections follow, also where none are asked.
            return
        phase = "rollout" if phase == "reflect" else phase
        jax.block_until_ready(arrays)
        now = time.perf_counter()
        self.spent[phase] = self.spent.get(phase, 0.0) + now - self._last
        self._last = now


class Ours:
    """`emor3_jax.train`'s step, without logging, evaluation and checkpoints."""

    def __init__(self, config: ConfigDict) -> None:
        """Loads the policy and opens the data."""
        self.config, self.mesh = config, make_mesh()
        jax.set_mesh(self.mesh)
        self.policy = prepare.load_policy(config, Console("step"), self.mesh)
        self.data = prepare.open_data(config, self.policy)
        self.labels = self.data.labels["train"]
        rollout = prepare.make_rollout(config, self.policy, self.labels, self.mesh)
        # Nothing ends a response, so all have T tokens.
        suppressed = rollout.suppressed.copy()
        suppressed[list(self.policy.processor.tokenizer.added_tokens_decoder)] = True
        self.rollout = dataclasses.replace(
            rollout, suppressed=suppressed, sampling=rollout.sampling._replace(stop=())
        )
        self.learner, self.state = prepare.make_learner(config, self.policy, self.mesh)
        self.learner.suppressed = suppressed
        self.steps = 0

    def step(self) -> tuple[float, dict[str, float], dict[str, Any]]:
        """Takes one step; returns its seconds, those of its phases, and what it found."""
        started, clock = time.perf_counter(), StepClock()
        key = jax.random.fold_in(jax.random.key(0), self.steps)
        self.steps += 1
        batch = shard_batch(next(self.data.train).batch, self.mesh)
        clock.mark("data", None)
        experience = self.rollout(self.state.params, batch, key, clock)
        # As TRL: sample standard deviation.
        advantage = advantages.grpo(experience.rewards, std="sample")
        clock.mark("reward", advantage)
        experience, plan, _ = self.learner.plan(experience)
        ref_logprobs = self.reference(experience, plan)
        clock.mark("reference", ref_logprobs)
        experience = experience._replace(ref_logprobs=ref_logprobs, advantages=advantage)
        metrics = jax.device_get(self.update(experience, plan))
        clock.mark("update", metrics)
        seconds = time.perf_counter() - started
        found = {
            "lengths": sorted(set(np.asarray(experience.samples.lengths).flat)),
            "loss": float(metrics["loss"]),
            "grad_norm": float(metrics["grad_norm"]),
            "pattern": float(experience.scores.terms["pattern"].mean()),
        }
        return seconds, clock.spent, found

    def reference(self, experience: Experience, plan: StepPlan) -> jax.Array:
        """Scores responses under the frozen policy."""
        spec = self.learner.spec
        return planned_logprobs(
            self.learner.reference.params,
            experience.batch,
            experience.samples,
            plan,
            self.learner.suppressed,
            policy=spec.policy,
            spec=spec.logprobs,
        ).logprobs

    def update(self, experience: Experience, plan: StepPlan) -> dict[str, jax.Array]:
        """Takes one optimizer step."""
        (part,) = self.learner.split(experience, plan)
        self.state, metrics = self.learner.update(self.state, part)
        return metrics


def batch_of(ours: Ours, rows: Iterable[int]) -> Batch:
    """Returns the batch of given rows."""
    config, policy, source = ours.config, ours.policy, ours.data.sources["train"]
    template = prepare.load_templates(config).set
    examples = [
        encode_row(source[int(row)], policy.processor, template, ours.labels) for row in rows
    ]
    batch, _ = collate(
        examples,
        policy.processor.layout,
        batch_size=len(examples),
        prompt_lengths=config.data.prompt_lengths,
        image_windows=config.data.image_windows,
    )
    return batch


def question() -> str:
    """Returns what is asked of each image, as both sides ask it."""
    labels = label_set(small_policy.LABELS)
    template = PromptTemplates.load().set
    return fill(template, question=small_policy.QUESTION, labels=labels)


class Agreement(NamedTuple):
    """Largest differences between TRL's first batch and ours on it.

    Attributes:
      rewards, logprobs, loss: absolute.
      advantages: absolute; TRL adds 1e-4 to the standard deviation, we add 1e-6.
      grad_norm: relative, both with TRL's advantages.
    """

    rewards: float
    advantages: float
    logprobs: float
    loss: float
    grad_norm: float


def compare(ours: Ours, record: Path) -> Agreement:
    """Puts TRL's first batch through our rewards, reference and update; takes a step by it."""
    config = ours.config
    b, g = config.rollout.prompts, config.rollout.responses
    given = np.load(record)
    batch = batch_of(ours, given["rows"][::g])
    prompts = given["prompts"][::g]
    padded = batch.prompt.tokens[:, : prompts.shape[1] - 1]
    our_prompts = np.concatenate([padded, batch.last_token[:, None]], axis=1)
    assert np.array_equal(our_prompts, prompts), "the prompts differ"
    tokens = given["tokens"].reshape(b, g, TOKENS).astype(np.int32)
    # TRL's distribution is over all ids, special ones too.
    nothing = np.zeros_like(ours.rollout.suppressed)
    samples = Samples(
        jnp.asarray(tokens),
        jnp.zeros(tokens.shape),
        jnp.full((b, g), TOKENS, jnp.int32),
        jnp.zeros((b, g), bool),
    )
    scores = ours.rollout.scorer.score(batch, samples, None)
    theirs = given["scores"].reshape(b, g, 3) @ np.array(reward_weights(config), np.float32)
    advantage = advantages.grpo(scores.overall, std="sample")
    ours.learner.suppressed = nothing
    experience, plan, _ = ours.learner.plan(Experience(batch, samples, None, None, None))
    ref_logprobs = ours.reference(experience, plan)
    # The first update's policy is the reference and the sampler.
    experience = experience._replace(
        samples=samples._replace(logprobs=ref_logprobs),
        ref_logprobs=ref_logprobs,
        advantages=jnp.asarray(given["advantages"].reshape(b, g)),
    )
    metrics = jax.device_get(ours.update(experience, plan))
    return Agreement(
        float(np.abs(theirs - scores.overall).max()),
        float(np.abs(given["advantages"].reshape(b, g) - advantage).max()),
        float(np.abs(given["reference"].reshape(tokens.shape) - ref_logprobs).max()),
        float(np.abs(given["loss"] - metrics["loss"])),
        float(np.abs(given["grad_norm"] / metrics["grad_norm"] - 1)),
    )


def reward_weights(config: ConfigDict) -> tuple[float, float, float]:
    """Returns the weights of format, accuracy and pattern, without reflection."""
    format_ = config.reward.lambda_format
    return format_, 1 - format_, config.reward.terms.pattern.weight


def start_peer(
    case: tuple[int, int, int], folder: Path, precision: str, record: Path | None, options: Any
) -> Peer:
    """Starts TRL on the same case."""
    config = make_config(case, folder, "float32", False)
    update_ = config.policy_update
    job = {
        "policy": config.policy.path,
        "rows": config.data.train.path,
        "question": question(),
        "prompts": case[0],
        "responses": case[1],
        "tokens": TOKENS,
        "precision": precision,
        "cache": options.cache,
        "micro": options.micro,
        "steps": 1 + WARM_UP + options.runs,
        "learning_rate": update_.learning_rate,
        "weight_decay": update_.weight_decay,
        "max_grad_norm": update_.max_grad_norm,
        "clip_low": update_.clip_low,
        "clip_high": update_.clip_high,
        "kl_coef": update_.kl_coef,
        "pattern": PATTERN,
        "weights": reward_weights(config),
        "output": str(folder / "trl"),
        "record": str(record) if record else "",
    }
    return Peer("benchmarks.peer_trl", job)


def run_case(case: tuple[int, int, int], folder: Path, options: Any) -> None:
    """Measures one case and prints its tables."""
    record = folder / "record.npz"
    peers = {
        name: start_peer(case, folder, name, record if name == "float32" else None, options)
        for name in options.peers
    }
    sides: dict[str, Ours] = {}
    for name in PRECISIONS:
        sides[name] = Ours(make_config(case, folder, name, False))
        sides[f"{name}, both reflections"] = Ours(make_config(case, folder, name, True))
    seconds: dict[str, list[float]] = {}
    phases: dict[str, dict[str, list[float]]] = {}

    def note(name: str, spent: float, split: dict[str, float], kept: bool) -> None:
        if kept:
            seconds.setdefault(name, []).append(spent)
            for phase, value in split.items():
                phases.setdefault(name, {}).setdefault(phase, []).append(value)

    for run in range(WARM_UP + options.runs):
        for name, side in sides.items():
            spent, split, found = side.step()
            assert found["lengths"] == [TOKENS] and np.isfinite(found["loss"]), found
            note(f"emor3_jax, {name}", spent, split, run >= WARM_UP)
        for name, peer in peers.items():
            said = peer.turn()
            assert said["lengths"] == [TOKENS], said
            note(f"TRL, {name}", said["seconds"], said["phases"], run >= WARM_UP)
    for peer in peers.values():
        peer.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print_case(case, medians, seconds, phases)
    if record.exists():
        agreement = compare(Ours(make_config(case, folder, "float32", False)), record)
        differences = ", ".join(f"{k} {v:.0e}" for k, v in agreement._asdict().items())
        print(f"\nTRL's first batch in our float32 code, largest differences: {differences}")


def print_case(
    case: tuple[int, int, int],
    medians: dict[str, float],
    seconds: dict[str, list[float]],
    phases: dict[str, dict[str, list[float]]],
) -> None:
    """Prints the rows of a case, slowest and fastest run beside the median, and the split."""
    b, g, side = case
    ours = min(v for k, v in medians.items() if k in {f"emor3_jax, {p}" for p in PRECISIONS})
    theirs = [v for k, v in medians.items() if k in {f"TRL, {p}" for p in PRECISIONS}]
    print(f"\n{b} prompts x {g} responses x {TOKENS} tokens, images of {side} x {side}\n")
    print("| | seconds a step, median | fastest | slowest | to our best | of which |")
    print("|---|---|---|---|---|---|")
    for name, median in medians.items():
        split = ", ".join(
            f"{phase} {statistics.median(values):.2f}" for phase, values in phases[name].items()
        )
        runs = seconds[name]
        print(
            f"| {name} | {median:.2f} | {min(runs):.2f} | {max(runs):.2f} | {median / ours:.2f} |"
            f" {split} |"
        )
    if theirs:
        print(f"\nbest TRL / best emor3_jax: {min(theirs) / ours:.2f}")


def main() -> None:
    """Writes policy and images, runs the cases, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="keep policy and images here")
    parser.add_argument("--runs", type=whole(1), default=RUNS)
    parser.add_argument("--cases", type=whole(0), nargs="*", default=range(len(CASES)))
    parser.add_argument("--peers", nargs="*", default=PEER_PRECISIONS, choices=PEER_PRECISIONS)
    parser.add_argument("--cache", default="", help="TRL's cache_implementation")
    parser.add_argument("--micro", type=whole(0), default=0, help="responses of a TRL micro-batch")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        count = small_policy.write_policy(folder / "policy")
        print(f"{date.today()}, {jax.devices()[0].device_kind}, {count / 1e6:.1f} M parameters")
        for number in options.cases:
            case = CASES[number]
            small_policy.write_rows(folder / f"{case[2]}.parquet", case[2], 16)
            run_case(case, folder, options)


if __name__ == "__main__":
    main()
