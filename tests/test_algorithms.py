"""Every line of flags of docs/algorithms.md trains two steps."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags
from support import tiny_run
from support.tiny_run import make_folder, read_metrics

import emor3_jax
from emor3_jax.config import reward_term
from emor3_jax.io import report
from emor3_jax.train import train

PAGE = Path(emor3_jax.__file__).parents[1] / "docs/algorithms.md"
LINES = re.findall(r"^--config\..*$", PAGE.read_text(), re.M)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Has a judge of the other family beside the policy, in the place of one of the hub."""
    folder = make_folder(tmp_path_factory.mktemp("algorithms"))
    tiny_run.write_policy(folder / "judge", "qwen3_vl")
    return folder


def test_every_paper_has_flags() -> None:
    for section in re.split(r"^### ", PAGE.read_text(), flags=re.M)[1:]:
        assert "\n--config." in section, section.splitlines()[0]
    assert len(set(LINES)) == len(LINES) > 25


@pytest.mark.parametrize("line", LINES)
def test_two_steps_of(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run.make_config(folder)
    config.steps, config.evaluate.sets = 2, ConfigDict()
    config.rollout.max_tokens, config.policy_update.response_lengths = 16, (16,)
    # A random policy earns no other reward.
    config.reward.terms.letters = reward_term(weight=0.1, text="support.tiny_run:letters")
    # Half of the time of a compile is the tower's.
    config.policy.freeze_vision_tower, config.policy_update.remat = True, "none"
    command = ["program", *line.replace("Qwen/Qwen3-VL-8B-Instruct", f"{folder}/judge").split()]
    # Where `config_flags` looks for the fields that are given.
    monkeypatch.setattr(sys, "argv", command)
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values)
    values(command)
    # A third of a run's time, and the same for all.
    monkeypatch.setattr(report, "write_report", lambda *_: None)
    workdir = folder / str(LINES.index(line))
    train(config, workdir)
    rows = read_metrics(workdir)[1:]
    assert len(rows) == 2
    for row in rows:
        assert row["policy/skipped"] == 0
        # What leaves out responses that were cut may leave out all.
        assert row["policy/grad_norm"] > 0 or row["response/truncated_fraction"] == 1
        assert np.isfinite(row["policy/loss"])
