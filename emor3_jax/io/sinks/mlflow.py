"""MLflow: one run of its tracking for each workdir, which goes on when the run does.

Server and experiment are those of its own variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME);
the experiment is `emor3_jax` otherwise.

Deviations, numbered:
 1. A run that resumes writes some steps again; MLflow keeps both values and shows the later one.
 2. A step does not wait for a server as long as MLflow would, 4.5 minutes where nothing listens:
    unless its own variables say otherwise, a request is sent three times and waits 10 s each, and
    after one that failed the steps of a minute are not sent.
"""

import json
import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from emor3_jax.errors import UserError
from emor3_jax.io.fields import fields_of

logger = logging.getLogger(__name__)

_MOST_PARAMS, _LONGEST = 100, 500
"""Parameters of one call, and characters of a value, that every server takes."""

_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_PAUSE = 60.0
"""Seconds without an attempt after one that failed."""

_FOREIGN = re.compile(r"[^\w\-./ ]")


class MlflowSink:
    """Writes values to an MLflow server; one that fails later loses values, never the run."""

    def __init__(self, workdir: Path, first_step: int) -> None:
        """Begins the run there, or goes on with it.

        Args:
          workdir: folder of the run; its MLflow id is kept in `mlflow_run`, its config is sent.
          first_step: steps from here on are written, maybe again.

        Raises:
          UserError: if the server refuses or is not there, or the small package of MLflow cannot
            open its store.
        """
        del first_step
        self._lost, self._paused_until, known = 0, 0.0, workdir / "mlflow_run"
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        goes_on = known.exists()
        try:
            self._client = MlflowClient()
            if goes_on:
                self._id = known.read_text("utf-8").strip()
                self._client.update_run(self._id, status="RUNNING")
            else:
                self._id = self._begin(workdir)
                known.write_text(self._id, "utf-8")
        except MlflowException as error:
            said = str(error).strip().splitlines()[0].rstrip(".")
            rule = f"{said}; set MLFLOW_TRACKING_URI to a server that is there, or to a folder"
            rule += " with MLFLOW_ALLOW_FILE_STORE=true"
            if goes_on:
                rule += f"; if that has no such run any more, delete {known} to begin another"
            raise UserError(f"log.sinks='mlflow': {rule}") from error

    def _begin(self, workdir: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "emor3_jax")
        there = self._client.get_experiment_by_name(name)
        experiment = there.experiment_id if there else self._client.create_experiment(name)
        run = self._client.create_run(experiment, run_name=workdir.name).info.run_id
        config = workdir / "config.json"
        fields = dict(fields_of(json.loads(config.read_text("utf-8")))) if config.exists() else {}
        params = [Param(_named(key), str(value)[:_LONGEST]) for key, value in fields.items()]
        for i in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(run, params=params[i : i + _MOST_PARAMS])
        self._client.log_batch(run, tags=[RunTag("workdir", str(workdir.absolute()))])
        return run

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes the values of a step, without those that are None."""
        if time.monotonic() < self._paused_until:
            self._lost += 1
            return
        now = int(time.time() * 1000)
        metrics = [
            Metric(_named(name), value, now, step)
            for name, value in values.items()
            if value is not None
        ]
        try:
            self._client.log_batch(self._id, metrics=metrics)
        except MlflowException as error:
            self._lost += 1
            self._paused_until = time.monotonic() + _PAUSE
            if self._lost == 1:
                logger.warning("mlflow: step %d is not written: %s", step, error)

    def amend(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes further values of a step."""
        self.write(step, values)

    def close(self) -> None:
        """Ends the run there, and says how many steps it lacks."""
        if self._lost:
            logger.warning("mlflow lacks %d steps; metrics.jsonl has all", self._lost)
        try:
            self._client.set_terminated(self._id)
        except MlflowException as error:
            logger.warning("mlflow: the run stays open there: %s", error)


def _named(name: str) -> str:
    """Returns a name that every server takes."""
    return _FOREIGN.sub("_", name)
