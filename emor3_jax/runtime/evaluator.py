"""Evaluation of a policy on the sets of a config, with every response written to a file."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax import prepare
from emor3_jax.data.batch import Prompts
from emor3_jax.evaluation.evaluation import Extras, evaluate
from emor3_jax.evaluation.records import Evaluation, prediction_file, with_groups
from emor3_jax.io import report
from emor3_jax.io.console import Console, ProgressTask
from emor3_jax.models import LoadedPolicy
from emor3_jax.models.processor import Processor
from emor3_jax.parallel.mesh import shard_batch
from emor3_jax.prepare.data import Data
from emor3_jax.rollout.judge import Judge


class Evaluator:
    """Evaluates policies on the evaluation sets of a config.

    Attributes:
      rollouts: data set → rollout of its label set.
    """

    def __init__(
        self,
        config: ConfigDict,
        policy: LoadedPolicy,
        data: Data,
        mesh: Mesh,
        judge: Processor | None = None,
    ) -> None:
        """Builds the rollouts.

        Args:
          config: see `emor3_jax.config.default`.
          policy: gives its sizes and its processor; any parameters can be evaluated.
          data: with the evaluation sets.
          mesh: of the devices.
          judge: processor of a judge that shares nothing but the text with the policy.
        """
        self._config, self._data, self._mesh = config, data, mesh
        self.rollouts = {
            name: prepare.make_evaluation_rollout(config, policy, data.labels[name], mesh, judge)
            for name in data.evaluate
        }
        self._extras = {
            name: Extras(
                prepare.make_label_likelihood(config, rollout),
                prepare.stated_values(config, data.sources[name]),
            )
            for name, rollout in self.rollouts.items()
        }

    def __call__(
        self,
        params: dict,
        names: Sequence[str],
        folder: Path,
        say: Console,
        *,
        judge: Judge | None = None,
        limit: int = 0,
        likelihood: bool = True,
        look: Callable[[], None] = lambda: None,
    ) -> dict[str, Evaluation]:
        """Evaluates a policy; returns data set or group of them → its evaluation.

        Args:
          params: of the policy.
          names: of the evaluation sets.
          folder: gets the file of predictions of each.
          say: shows how far it is.
          judge: who is asked about the responses; None asks the policy.
          limit: at most so many rows of each; 0 is all.
          likelihood: weigh the labels too, where the config asks for it.
          look: called before each batch; what it raises ends the evaluation.
        """
        config, found = self._config, {}
        for name in names:
            extras, rows = self._extras[name]._replace(judge=judge), self._data.evaluate[name]
            if not likelihood:
                extras = extras._replace(likelihood=None)
            rows = rows.take(limit) if limit else rows
            with (
                prediction_file(folder / f"{name}.jsonl") as record,
                say.task(name, rows.size, "rows") as task,
            ):
                found[name] = evaluate(
                    self.rollouts[name],
                    params,
                    _followed(rows, task, look),
                    config.seed,
                    put=lambda batch: shard_batch(batch, self._mesh),
                    keep=report.SAMPLES,
                    graded=config.evaluate.sets[name].graded,
                    record=record,
                    extras=extras,
                )
        return with_groups(found, config.evaluate.groups)


def _followed(
    batches: Iterable[Prompts], task: ProgressTask, look: Callable[[], None]
) -> Iterator[Prompts]:
    """Yields the batches; shows the rows of each as done once the next one is asked for."""
    for prompts in batches:
        look()
        yield prompts
        task.advance(sum(bool(row_id) for row_id in prompts.ids))
