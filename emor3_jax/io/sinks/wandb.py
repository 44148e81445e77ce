"""Weights & Biases: one run there for each workdir, which goes on when the run does.

Project, entity, mode and address are those of its own variables (WANDB_PROJECT, WANDB_ENTITY,
WANDB_MODE=offline, WANDB_BASE_URL …).

Deviations, numbered:
 1. Steps are values of their own (`step`), against which curves are drawn: W&B's own counter
    refuses to go back. A run that resumes writes some steps again, and the later point counts.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import wandb

from emor3_jax.errors import UserError


class WandbSink:
    """Writes values to W&B, in a process of its own that waits for the network."""

    def __init__(self, workdir: Path, first_step: int) -> None:
        """Begins the run there, or goes on with it.

        Args:
          workdir: folder of the run; its W&B id is kept in `wandb_id`, its config is sent.
          first_step: steps from here on are written, maybe again.

        Raises:
          UserError: if W&B refuses, such as without a login, or one of its variables.
        """
        del first_step
        config, known = workdir / "config.json", workdir / "wandb_id"
        fields = json.loads(config.read_text("utf-8")) if config.exists() else None
        name = known.read_text("utf-8").strip() if known.exists() else ""
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "emor3_jax"),
                id=name or None,
                resume="allow",
                name=workdir.name,
                dir=str(workdir),
                config=fields,
                # Lines of progress stay as they are.
                settings=wandb.Settings(console="off"),
            )
        # A value that a variable cannot have is a ValueError, whose first line does not name it.
        except (wandb.Error, ValueError) as error:
            of_variable = isinstance(error, ValueError)
            said = " ".join(str(error).split()) if of_variable else str(error).splitlines()[0]
            rule = f"{said}; log in with `wandb login`, or set WANDB_MODE=offline"
            raise UserError(f"log.sinks='wandb': {rule}") from error
        known.write_text(self._run.id, "utf-8")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes the values of a step, without those that are None."""
        found = {name: value for name, value in values.items() if value is not None}
        self._run.log({"step": step, **found})

    def amend(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes further values of a step."""
        self.write(step, values)

    def close(self) -> None:
        """Waits until all is sent, or on the disk."""
        self._run.finish()
