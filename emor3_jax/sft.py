"""Supervised fine-tuning: the policy learns given responses, token by token.

    python -m emor3_jax.sft --config=configs/table.py:sft --workdir=DIR [--config.key=value …]

    batch → responses to learn → update → log, evaluate, checkpoint

With `sft.target="label"` the response is the boxed label alone, without reasoning: the paper's
baseline SFT, and on a few rows its Cold-Start-Emo, from which reinforcement learning goes on with
`--config.policy.path=DIR/policy`. With `sft.target="response"` it is what the row itself says
(`data.sources.Texts.responses`), whole reasoning for example; several responses to a row share one
pass over its picture and question. Prompt tokens carry no loss.

Data, mesh, optimizer (`policy_update`), checkpoints, metrics, evaluation and what `workdir` holds
are those of `emor3_jax.train`; a step reads `rollout.prompts` rows.

Deviations, numbered:
 1. The paper says of its cold start that it is light and on labels; which question is asked, and
    how many rows, is the config's choice (configs/table.py).
"""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from emor3_jax import cli, prepare
from emor3_jax.config import ConfigError
from emor3_jax.data.batch import part_of, take_part
from emor3_jax.data.errors import DataError
from emor3_jax.data.sources import Texts
from emor3_jax.episode import banned_ids
from emor3_jax.io.evaluation import Evaluation
from emor3_jax.io.metrics import Lap, PhaseClock, memory
from emor3_jax.learner import imitate, trim
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import shard_whole
from emor3_jax.rl.update import TrainState
from emor3_jax.rollout.generate import Samples
from emor3_jax.run import Pace, Run, StopSignal


def train(config: ConfigDict, workdir: Path) -> dict[str, dict[str, Evaluation]]:
    """Runs fine-tuning from its start, or from the last checkpoint, to `config.steps`.

    Args:
      config: see `emor3_jax.config.default`.
      workdir: folder of the run, made if it does not exist.

    Returns:
      {"before": {data set: Evaluation}, "after": {…}}; empty if a signal stopped the run.

    Raises:
      ConfigError, DataError, MeshError: before any compile, for a config that cannot run.
    """
    run = Run.open("sft", config, workdir)
    say, mesh, policy, data = run.say, run.mesh, run.policy, run.data
    tokenizer = policy.processor.tokenizer
    banned = banned_ids(policy.config, tokenizer)
    lessons = Lessons(
        config, tokenizer, banned, data.labels["train"], data.sources["train"].texts()
    )
    say(lessons.describe())

    optimizer, loss = prepare.make_update(config)
    lora = prepare.make_lora(config, policy.params)
    state = TrainState.create(prepare.trained_params(config, policy.params), optimizer)
    state = run.resume(state)
    step = run.step

    def weights() -> dict:
        """Returns the parameters of the policy as it is now."""
        return lora.merge(state.params) if lora else state.params

    scoring = prepare.score_options(config)._replace(temperature=1.0)
    parts = config.rollout.prompts // config.policy_update.prompts
    micro = config.policy_update.prompts // config.policy_update.micro_prompts

    run.look_before(weights())
    say(f"training to step {config.steps}; the first step compiles")
    stop, clock, pace = StopSignal(), PhaseClock(), Pace(step, config.steps)
    pending: _Step | None = None

    def log(done: _Step, extra: dict[str, float] | None = None) -> None:
        """Logs a step; waits for what of it the device is still computing."""
        values = done.metrics() | memory() | data.counters() | lessons.counters() | (extra or {})
        values["compile/count"] = float(run.compiles.count)
        run.writer.write(done.step, values)
        if done.step % config.log.every == 0 or done.step == config.steps:
            say(
                f"step {done.step}/{config.steps}  loss {values['policy/loss']:.3f}  "
                f"{values['time/step_s']:.2f} s  left {pace.left(done.step)}"
            )

    last = step >= config.steps
    upcoming = None if last else next(data.train)
    while not last:
        host_batch, ids = upcoming
        batch = run.put(host_batch)
        given = lessons.samples(ids, hosts.fetch(batch.answers))
        lengths = given.lengths
        given = trim(given, int(lengths.max()), config.policy_update.response_lengths)
        rows = prepare.plan_packing(config, policy, lengths, given)
        given, rows = shard_whole((given, rows), mesh)
        learned = []
        for part in range(parts):
            state, metrics = imitate(
                state,
                take_part(batch, part, parts, policy.config.vision.merge_unit),
                *part_of((given, rows), part, parts),
                banned,
                lora,
                config=policy.config,
                optimizer=optimizer,
                loss=loss,
                options=scoring,
                count=micro,
            )
            learned.append(metrics)
        clock.mark("update", learned)
        step += 1

        # The device is busy now: meanwhile the host logs the step before and reads on.
        if pending is not None:
            log(pending)
        position, before_data = data.train.get_state(), time.perf_counter()
        upcoming = next(data.train) if step < config.steps else None
        waited = time.perf_counter() - before_data
        pending = _Step(step, lengths, learned, waited, clock.lap())
        # Agreed upon once a step, so that what ends the loop also saves, on all hosts.
        last = hosts.agree(stop.asked) or step == config.steps

        evaluations = run.look_during(weights, step)
        if evaluations or last or step % config.checkpoint.every == 0:
            log(pending, evaluations)
            pending = None
            if last or step % config.checkpoint.every == 0:
                run.save(step, state, {"data": position})
            clock.restart()

    clock.close()
    stop.restore()
    return run.finish(weights(), step) if step == config.steps else run.stopped(step)


class Lessons:
    """The responses to learn from, by row."""

    def __init__(
        self,
        config: ConfigDict,
        tokenizer: PreTrainedTokenizerBase,
        banned: np.ndarray,
        labels: Sequence[str],
        rows: Iterable[Texts],
    ) -> None:
        """Tokenises the labels, or reads the responses of all rows.

        Args:
          config: of the run.
          tokenizer: of the policy.
          banned: bool[V], ids that a response may not contain.
          labels: the label set.
          rows: the texts of all rows.

        Raises:
          ConfigError: if a label does not fit `rollout.max_tokens`.
          DataError: if no row has a response that can be learned.
        """
        self._tokenizer, self._banned = tokenizer, banned
        self._end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._limit, self._most = config.rollout.max_tokens, config.sft.responses
        self._counts = {"no_response": 0, "long_response": 0, "special_token_in_response": 0}
        self._of_row: dict[str, list[list[int]]] = {}
        self._of_label: list[list[int]] = []
        if config.sft.target == "label":
            self._most = 1
            self._of_label = [self._encode(f"\\boxed{{{label}}}") for label in labels]
            longest = max(map(len, self._of_label))
            if longest > self._limit:
                rule = f"a boxed label takes {longest} tokens; raise it"
                raise ConfigError("rollout.max_tokens", self._limit, rule)
            return
        for texts in rows:
            if found := self._usable(texts.responses[: self._most]):
                self._of_row[texts.id] = found
        if not self._of_row:
            why = ", ".join(f"{count} {reason}" for reason, count in self._counts.items() if count)
            raise DataError(
                f"config.sft.target='response': no row has a response to learn from ({why}); give "
                "rows a 'response' (docs/data.md), raise rollout.max_tokens, or take 'label'"
            )

    def _encode(self, text: str) -> list[int]:
        return [*self._tokenizer.encode(text, add_special_tokens=False), self._end]

    def _usable(self, responses: Sequence[str]) -> list[list[int]]:
        """Returns the responses as tokens, those left out counted by reason."""
        self._counts["no_response"] += not responses
        found = []
        for text in responses:
            tokens = self._encode(text)
            if len(tokens) > self._limit:
                self._counts["long_response"] += 1
            elif self._banned[tokens].any():
                self._counts["special_token_in_response"] += 1
            else:
                found.append(tokens)
        return found

    def describe(self) -> str:
        """Returns in a sentence what is learned."""
        if self._of_label:
            return f"learning the boxed label alone, {len(self._of_label)} of them"
        count = sum(map(len, self._of_row.values()))
        return f"learning {count} responses to {len(self._of_row)} rows"

    def counters(self) -> dict[str, float]:
        """Returns `data/<reason>`: rows without a response and responses left out, if any."""
        return {f"data/{reason}": float(count) for reason, count in self._counts.items() if count}

    def samples(self, ids: Sequence[str], answers: np.ndarray) -> Samples:
        """Returns the responses to the rows of a batch, as if they had been sampled.

        Args:
          ids: B of them.
          answers: int[B], index of the label of each.

        Returns:
          Host arrays, [B, G, T]; a missing response has length 0.
        """
        if self._of_label:
            found = [[self._of_label[int(answer)]] for answer in answers]
        else:
            found = [self._of_row.get(row_id, []) for row_id in ids]
        shape = len(found), self._most
        tokens = np.zeros((*shape, self._limit), np.int32)
        lengths = np.zeros(shape, np.int32)
        for i, row in enumerate(found):
            for g, response in enumerate(row):
                tokens[i, g, : len(response)], lengths[i, g] = response, len(response)
        return Samples(tokens, np.zeros(tokens.shape, np.float32), lengths, np.ones(shape, bool))


class _Step(NamedTuple):
    """What is logged of a step; its arrays may still be computed."""

    step: int
    lengths: np.ndarray
    learned: list[dict[str, jax.Array]]
    data_seconds: float
    phases: Lap

    def metrics(self) -> dict[str, float]:
        """Returns the metrics by name; waits for the arrays."""
        seconds = sum(self.phases.read().values())
        learned = jax.device_get(self.learned)
        values = {f"policy/{k}": float(np.mean([m[k] for m in learned])) for k in learned[0]}
        there = self.lengths[self.lengths > 0]
        return values | {
            "response/length_mean": float(there.mean()) if there.size else 0.0,
            "time/update_s": seconds,
            "time/step_s": seconds,
            "time/data_s": self.data_seconds,
            "throughput/responses_per_s": there.size / seconds,
            "throughput/tokens_per_s": float(there.sum()) / seconds,
        }


if __name__ == "__main__":
    cli.run(train, may_stop=True)
