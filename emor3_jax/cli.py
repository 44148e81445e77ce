"""The command line of the programs: `--config`, mostly `--workdir`, and errors without a trace."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from emor3_jax.account.step import ShapeError
from emor3_jax.config import ConfigError
from emor3_jax.data.errors import DataError
from emor3_jax.models.qwen2_5_vl.config import ConfigError as PolicyError
from emor3_jax.models.qwen2_5_vl.processor import ProcessorError
from emor3_jax.models.qwen2_5_vl.weights import WeightsError
from emor3_jax.parallel.mesh import MeshError
from emor3_jax.parallel.topology import TopologyError
from emor3_jax.rewards import LabelError, TokenizerError

USER_ERRORS = (
    ConfigError,
    DataError,
    FileNotFoundError,
    LabelError,
    MeshError,
    PolicyError,
    ProcessorError,
    ShapeError,
    TokenizerError,
    TopologyError,
    WeightsError,
)
"""Mistakes of a config or of data: their message is all that a user needs."""


def run(program: Callable[[ConfigDict, Path], object], workdir: str | None = None) -> None:
    """Parses the command line and runs a program that writes to the folder of a run.

    Args:
      program: takes the config and the folder of the run.
      workdir: that folder where the command line names none; None requires that it does.
    """
    folder = flags.DEFINE_string("workdir", workdir, "Folder of the run.", required=workdir is None)
    run_without_workdir(lambda config: program(config, Path(folder.value)))


def run_without_workdir(program: Callable[[ConfigDict], object]) -> None:
    """Parses the command line and runs a program that only prints.

    An unknown `--config.key` is refused by `config_flags`, which names the nearest key. Errors in
    `USER_ERRORS` end the program with their message and exit status 2.

    Args:
      program: takes the config.
    """
    config = config_flags.DEFINE_config_file("config", None, "File that returns the config.")
    flags.mark_flag_as_required("config")

    def main(_: Sequence[str]) -> None:
        try:
            program(config.value)
        except USER_ERRORS as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(main)
