"""Supervised fine-tuning: the policy learns given responses, token by token.

    python -m emor3_jax.sft --config=configs/table.py:sft --workdir=DIR [--config.key=value …]

    batch → responses to learn → update → log, evaluate, checkpoint

With `sft.target="label"` the response is the boxed label alone, without reasoning: the paper's
baseline SFT, and on a few rows its Cold-Start-Emo, from which reinforcement learning goes on with
`--config.policy.path=DIR/policy`. With `sft.target="response"` it is what the row itself says
(`data.sources.Texts.responses`), whole reasoning for example; several responses to a row share one
pass over its image and question, and rows without one are not drawn. Prompt tokens carry no loss.

Data, mesh, optimizer (`policy_update`), checkpoints, metrics, evaluation and what `workdir` holds
are those of `emor3_jax.train`; a step reads `rollout.prompts` rows.

Deviations, numbered:
 1. The paper says of its cold start that it is light and on labels; which question is asked, and
    how many rows, is the config's choice (configs/table.py).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from emor3_jax import prepare
from emor3_jax.config import ConfigError
from emor3_jax.models import LoadedPolicy
from emor3_jax.parallel import hosts
from emor3_jax.parallel.mesh import shard_whole
from emor3_jax.prepare import Data
from emor3_jax.prepare.responses import Responses
from emor3_jax.runtime import cli
from emor3_jax.runtime.run import Results, Run
from emor3_jax.runtime.step_log import observe
from emor3_jax.types import Batch, Experience, Samples


def train(config: ConfigDict, workdir: str | Path) -> Results:
    """Runs fine-tuning from its start, or from the last checkpoint, to `config.steps`.

    Args:
      config: see `emor3_jax.config.default`.
      workdir: folder of the run, made if it does not exist.

    Returns:
      {"before": {data set: Evaluation}, "after": {…}}; empty if a signal stopped the run.

    Raises:
      Stopped: as `emor3_jax.train`.
      ConfigError, DataError, MeshError: before any compile, for a config that cannot run.
    """
    with Run("sft", config, workdir, imitate=True) as run:
        examples = Examples(config, run.policy, run.data)
        run.say(examples.describe())
        learner, state = prepare.make_learner(config, run.policy, run.mesh, imitate=True)
        state = run.start(learner, state, counters=examples.counters)

        for step, prompts in run.steps():
            experience = examples.experience(prompts.ids, run.put(prompts.batch))
            experience = experience._replace(samples=shard_whole(experience.samples, run.mesh))
            experience, plan, padding = learner.plan(experience)
            observed = observe(prompts.ids, prompts.batch, experience)
            parts = learner.split(experience, plan)
            del experience
            updates = []
            while parts:
                state, metrics = learner.update(state, parts.pop(0))
                updates.append(metrics)
            run.record(step, observed, updates, padding)
            run.evaluate(step, learner, state)
            run.save(step, learner, state)
        return run.finish(partial(learner.params, state))


class Examples:
    """The responses to learn from, by row."""

    def __init__(self, config: ConfigDict, policy: LoadedPolicy, data: Data) -> None:
        """Tokenises the labels, or takes the responses of the rows.

        Args:
          config: of the run.
          policy: whose tokens they are.
          data: of the run, opened to imitate.

        Raises:
          ConfigError: if a label does not fit `rollout.max_tokens`.
        """
        self._limit, self._most = config.rollout.max_tokens, config.sft.responses
        self._counts: dict[str, int] = {}
        self._of_row: dict[str, list[list[int]]] = {}
        self._of_label: list[list[int]] = []
        if data.responses is not None:
            self._of_row, self._counts = data.responses.of_row, data.responses.counts
            return
        self._most, encode = 1, Responses(config, policy).encode
        self._of_label = [encode(f"\\boxed{{{label}}}") for label in data.labels["train"]]
        longest = max(map(len, self._of_label))
        if longest > self._limit:
            rule = f"a boxed label takes {longest} tokens; raise it"
            raise ConfigError("rollout.max_tokens", self._limit, rule)

    def describe(self) -> str:
        """Returns a sentence about the examples."""
        if self._of_label:
            return f"learning the boxed label alone, {len(self._of_label)} of them"
        count = sum(map(len, self._of_row.values()))
        return f"learning {count} responses to {len(self._of_row)} rows"

    def counters(self) -> dict[str, float]:
        """Returns `data/<reason>`: responses left out, if any."""
        return {f"data/{reason}": float(count) for reason, count in self._counts.items() if count}

    def experience(self, ids: Sequence[str], batch: Batch) -> Experience:
        """Returns the responses to the rows of a batch, as if they had been sampled.

        Args:
          ids: of the rows of all hosts.
          batch: B prompts on the devices.

        Returns:
          Samples as host arrays, [B, G, T]; a missing response has length 0. No scores.
        """
        answers = hosts.fetch(batch.answers)
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
        logprobs, ended = np.zeros(tokens.shape, np.float32), np.ones(shape, bool)
        samples = Samples(tokens, logprobs, lengths, ended)
        return Experience(batch, samples, None, None, None)


if __name__ == "__main__":
    cli.run(train, may_stop=True)
