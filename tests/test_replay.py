"""A guard ends a run, and a replay finds the cause."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from support import program, tiny_run

from emor3_jax.config import reward_term
from emor3_jax.errors import UserError
from emor3_jax.models import load, save
from emor3_jax.replay import replay
from emor3_jax.rewards import Group
from emor3_jax.runtime import replays
from emor3_jax.runtime.guards import GuardError
from emor3_jax.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_run.make_folder(tmp_path_factory.mktemp("replay"))


def not_a_number_once(group: Group) -> jax.Array:
    """A reward term that is none for the third response to the second prompt."""
    return jnp.zeros(group.lengths.shape).at[1, 2].set(jnp.nan)


def make_config(folder: Path) -> ConfigDict:
    config = tiny_run.make_config(folder)
    config.reflect.enabled, config.evaluate.every = False, 9
    config.guard.warn_after, config.guard.stop_after, config.checkpoint.every = 0, 2, 1
    return config


def test_a_term_that_is_no_number_is_found_in_its_row(folder):
    config, workdir = make_config(folder), folder / "term"
    config.reward.terms.odd = reward_term(weight=1.0, function=f"{__name__}:not_a_number_once")
    with pytest.raises(GuardError, match=r"not_finite: .*odd=nan.* emor3_jax\.replay ") as found:
        train(config, workdir)
    place = Path(str(found.value).rsplit(" ", 1)[1])
    assert place == replays.find(workdir) == replays.find(workdir, 2) == workdir / "replay/000002"
    kept = replays.read(place)
    lines = list(replay(place))
    assert lines[0].startswith("step 2, ended by guard not_finite: reward/odd=nan")
    for i, row_id in enumerate(kept.ids):
        at = lines.index(f"{row_id}  ({kept.origin.labels[kept.answers[i]]})")
        assert lines[at + 1] == f"  1: {kept.responses[i][0]!r}"
        assert "overall 0.000  format 0.000  accuracy 0.000" in lines[at + 2]
    assert sum("odd nan" in line for line in lines) == 1
    assert f"not finite: {kept.ids[1]}, response 3: odd=nan" == lines[-1]
    # The group was left out, so the updates are finite.
    assert "from the checkpoint of step 1" in lines
    updates = [line for line in lines if line.startswith("update ")]
    assert len(updates) == 2 and all(line.endswith("skipped 0") for line in updates)
    # Without pickles, and with what was sampled.
    said = json.loads((place / "step.json").read_text())
    assert said["ids"] == list(kept.ids) and np.shape(said["responses"]) == (4, 3)
    assert kept.advantages.shape == kept.rewards.shape == (4, 3)
    assert said["key"] == jax.random.key_data(jax.random.fold_in(jax.random.key(0), 1)).tolist()


def test_weights_that_are_far_too_large_are_found_in_every_row(folder):
    policy = load(folder / "policy")
    params = jax.tree.map(np.copy, policy.params)
    # All finite, and yet no logit is.
    params["model"]["norm"]["scale"] *= 3e38
    params["model"]["embed_tokens"]["embedding"] *= 1e3
    save(dataclasses.replace(policy, params=params), folder / "huge")
    config, workdir = make_config(folder), folder / "weights"
    config.policy.path = str(folder / "huge")
    with pytest.raises(GuardError, match="replay"):
        train(config, workdir)
    lines = list(replay(replays.find(workdir)))
    bad = [line for line in lines if line.startswith("not finite: ")]
    kept = replays.read(replays.find(workdir))
    for row_id in kept.ids:
        assert f"not finite: {row_id}: its gradient" in bad
        assert any(f"{row_id}, response 1: log-probability under the policy" in x for x in bad)
    assert any("grad_norm nan" in line and "skipped 1" in line for line in lines)


def test_what_is_no_batch_is_named_in_one_line(tmp_path):
    with pytest.raises(UserError, match="keeps no steps for a replay; name the folder of a run"):
        replays.find(tmp_path)
    place = tmp_path / "replay" / "000003"
    place.mkdir(parents=True)
    (place / "step.json").write_text("{}")
    with pytest.raises(UserError, match="keeps 3 steps for a replay"):
        replays.find(tmp_path, 4)
    with pytest.raises(UserError, match=r"000003: is no batch for a replay \(FileNotFound"):
        replays.read(replays.find(tmp_path))
    # A copy that somebody kept is none of the steps.
    shutil.copytree(place, place.with_name("copy"))
    assert replays.find(tmp_path) == place
    (place / "step.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="too many brackets"):
        replays.read(place)
    ran = program.run("emor3_jax.replay", str(tmp_path / "nothing"))
    assert ran.returncode == 2 and ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1
