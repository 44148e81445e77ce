"""The log of a step: metrics, a progress line, and a gallery of samples.

A step is logged while the device works on the next one; until then its arrays may still be
computed.
"""

from typing import NamedTuple

import jax
import numpy as np

from emor3_jax.evaluation.records import Sample, read_sample
from emor3_jax.io.console import fitted
from emor3_jax.io.metrics import PHASES, Lap
from emor3_jax.parallel import hosts
from emor3_jax.rewards.questions import QUESTIONS
from emor3_jax.rewards.scorer import Scorer
from emor3_jax.rl.advantages import zero_std_fraction
from emor3_jax.types import Array, Batch, Experience, Observed, Replies, Samples


def observe(ids: tuple[str, ...], batch: Batch, experience: Experience) -> Observed:
    """Returns the arrays of a step that its log reads; does not wait for them.

    Their way to the host begins as soon as they are there, so the log, a step later, finds them.

    Args:
      ids: of the prompts of all hosts.
      batch: this host's prompts, as host arrays.
      experience: of the step, with its batch on the devices.
    """
    samples, replies = _without_logprobs(experience.samples), experience.replies
    if isinstance(replies, Replies):
        said = {name: _without_logprobs(each) for name, each in replies.samples.items()}
        replies = replies._replace(samples=said)
    read = Experience(
        None, samples, replies, experience.scores, None, advantages=experience.advantages
    )
    read = read, experience.batch.answers, experience.rewards
    read, answers, rewards = hosts.start_fetch(hosts.everywhere(read))
    return Observed(ids, batch, read, answers, rewards)


def _without_logprobs(samples: Samples) -> Samples:
    """Returns samples without the one large array that no log reads."""
    return samples._replace(logprobs=None)


class StepRecord(NamedTuple):
    """A step that is to be logged.

    What reads it takes NumPy arrays and computes on the host: the device is busy with the next
    step, and whatever the log launched there would wait for the end of the update.

    Attributes:
      step: its number, from 1 on.
      observed: arrays of the rollout.
      updates: metrics of each update.
      info: further metrics, numbers or arrays.
      data_seconds: time that was waited for data.
      phases: time on the device by phase.
    """

    step: int
    observed: Observed
    updates: list[dict[str, Array]]
    info: dict[str, Array | float]
    data_seconds: float
    phases: Lap

    def fetched(self) -> "StepRecord":
        """Returns the record with NumPy arrays; waits for those that are not there yet."""
        found = jax.device_get((self.observed, self.updates, self.info))
        return self._replace(**dict(zip(("observed", "updates", "info"), found, strict=True)))

    def metrics(self) -> dict[str, float]:
        """Returns the metrics by name; of a record that was fetched."""
        seconds = self.phases.read()
        step_seconds = sum(seconds.values())
        scores, rewards = self.observed.experience.scores, self.observed.rewards
        ended, updates = self.observed.experience.samples.ended, self.updates
        # Supervised fine-tuning may lack a response; its length is then 0.
        lengths = self.observed.lengths
        there = lengths[lengths > 0]
        values = {
            f"policy/{name}": float(np.mean([metrics[name] for metrics in updates]))
            for name in sorted(updates[0].keys() - {"moved"})
        }
        values |= {f"time/{phase}_s": value for phase, value in seconds.items()}
        values |= {
            "response/length_mean": float(there.mean()) if there.size else 0.0,
            "time/data_s": self.data_seconds,
            "time/step_s": step_seconds,
            "throughput/responses_per_s": there.size / step_seconds,
            "throughput/tokens_per_s": float(there.sum()) / step_seconds,
        }
        if scores is not None:
            values |= {f"reward/{k}": float(np.mean(v)) for k, v in scores.named().items()}
            values["group/zero_std_fraction"] = float(zero_std_fraction(rewards))
            values["response/truncated_fraction"] = float(1 - ended.mean())
            # Before the first update of a step, the policy is the one that sampled.
            values["policy/sampler_gap"] = float(updates[0]["moved"])
        return values | {name: float(value) for name, value in self.info.items()}

    def read(self, scorer: Scorer, count: int) -> list[Sample]:
        """Decodes the first response to each of a few prompts; of a record that was fetched.

        Its advantage, where there is one, stands beside the scores.
        """
        answers, experience = self.observed.answers, self.observed.experience
        samples = [
            read_sample(scorer, row_id, answers[i], (i, 0), experience)
            for i, row_id in enumerate(self.observed.ids[:count])
        ]
        if (advantages := experience.advantages) is None:
            return samples
        return [
            sample._replace(scores=sample.scores | {"advantage": float(advantages[i, 0])})
            for i, sample in enumerate(samples)
        ]


def progress_line(
    step: int, steps: int, values: dict[str, float], left: str, width: int | None = None
) -> str:
    """Returns the main metrics of a step in one line.

    Args:
      step, steps: its number, and the last one's.
      values: metric → value.
      left: time that the run will still take.
      width: columns of a terminal, whose bar says what is left: the line then holds as much as
        fits, in columns that stand below each other.
    """
    if width is not None:
        return _terminal_line(f"step {step:>{len(str(steps))}}/{steps}", values, width)
    if "reward/overall" not in values:
        return (
            f"step {step}/{steps}  loss {values['policy/loss']:.3f}  "
            f"{values['time/step_s']:.2f} s  left {left}"
        )
    reward = "  ".join(
        f"{name} {values[f'reward/{name}']:.2f}" for name in ("format", "accuracy", *QUESTIONS)
    )
    phases = "  ".join(
        f"{name} {values[f'time/{name}_s']:.2f}" for name in PHASES if f"time/{name}_s" in values
    )
    return (
        f"step {step}/{steps}  reward {values['reward/overall']:.3f} ({reward})  "
        f"kl {values['policy/kl']:.3f}  {values['time/step_s']:.2f} s ({phases})  left {left}"
    )


def _terminal_line(step: str, values: dict[str, float], width: int) -> str:
    parts = [f"{step}  {values['time/step_s']:6.2f} s"]
    if "reward/overall" in values:
        parts.append(f"reward {values['reward/overall']:.3f}")
        names = ("accuracy", "format", *QUESTIONS)
        parts += [f"{name} {values[f'reward/{name}']:.2f}" for name in names]
        parts.append(f"kl {values['policy/kl']:.3f}")
    else:
        parts.append(f"loss {values['policy/loss']:.3f}")
    parts.append(f"tokens {values['response/length_mean']:.1f}")
    return fitted(parts, width)
