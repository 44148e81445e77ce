"""Who is asked about a response: the policy, its reference, or a policy of its own."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from support import tiny_run
from support.tiny_run import make_folder, read_metrics

from emor3_jax import evaluate, prepare
from emor3_jax.config import ConfigError
from emor3_jax.models import LoadedPolicy, load, save
from emor3_jax.parallel.mesh import make_mesh, shard_batch
from emor3_jax.prepare.judge import keeps_reference, load_judge
from emor3_jax.rollout.engine import Finished
from emor3_jax.rollout.rollout import prefill
from emor3_jax.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Beside the policy there is another one of the same tokens, `judge`."""
    folder = make_folder(tmp_path_factory.mktemp("judge"))
    loaded = load(folder / "policy")
    params = jax.device_get(loaded.policy.init(jax.random.key(7)))
    save(LoadedPolicy(loaded.policy, params, loaded.processor), folder / "judge")
    return folder


def make_config(folder: Path, training: str, evaluation: str = "") -> ConfigDict:
    """A run of two steps whose replies are probabilities, so that no judge is like another."""
    config = tiny_run.make_config(folder)
    config.steps, config.evaluate.every = 2, 9
    config.reflect.soft, config.reflect.judge, config.evaluate.judge = True, training, evaluation
    config.policy_update.learning_rate = 1e-2
    return config


def result(workdir: Path) -> tuple[dict, dict]:
    """Evaluations before and after training."""
    before, after = json.loads((workdir / "evaluations.json").read_text())
    return before["test"], after["test"]


def test_a_judge_of_its_own_is_the_reference_if_they_are_equal(folder):
    train(make_config(folder, "reference"), folder / "reference")
    train(make_config(folder, str(folder / "policy")), folder / "own")
    rows, wanted = read_metrics(folder / "own")[1:], read_metrics(folder / "reference")[1:]
    for row, other in zip(rows, wanted, strict=True):
        for name in ("reward/overall", "reward/coherence", "policy/loss", "policy/grad_norm"):
            assert row[name] == other[name], name
    assert result(folder / "own") == result(folder / "reference")
    title = "reflections asked of reference"
    assert title in (folder / "reference" / "report.html").read_text()
    # Evaluated by the same judge, the checkpoint has the same scores.
    config = make_config(folder, "policy", "reference")
    config.evaluate.checkpoint = str(folder / "reference")
    found = evaluate.main(config, folder / "evaluated")["test"].metrics
    assert found == pytest.approx(result(folder / "reference")[1])


def test_a_reference_is_kept_for_a_judge_alone(folder):
    config = make_config(folder, "policy", "reference")
    config.policy_update.kl = "off"
    assert keeps_reference(config)
    train(config, folder / "no_kl")
    plain = make_config(folder, "policy")
    plain.policy_update.kl = "off"
    assert not keeps_reference(plain)
    train(plain, folder / "plain")
    # Before training the two are the same policy.
    (before, after), (wanted, other) = result(folder / "no_kl"), result(folder / "plain")
    assert before == wanted
    assert after["accuracy"] == other["accuracy"]
    assert read_metrics(folder / "no_kl")[2]["policy/kl"] == 0


def test_a_judge_is_asked_as_if_it_had_written_the_responses(folder):
    """Its replies are those of a rollout of its own about the same responses."""
    config, mesh = make_config(folder, str(folder / "judge")), make_mesh()
    policy, other = load(folder / "policy"), load(folder / "judge")
    with jax.set_mesh(mesh):
        data = prepare.open_data(config, policy, mesh)
        rollout = prepare.make_rollout(config, policy, data.labels["train"], mesh)
        batch, key = shard_batch(next(data.train).batch, mesh), jax.random.key(3)
        judge = load_judge(config, "reflect.judge", str(folder / "judge"), policy, print, mesh)
        found = rollout(policy.params, batch, key, judge=judge)
        prefix = prefill(other.params, batch, policy=policy.policy)
        rows = np.arange(len(batch.last_token))
        finished = Finished(rows, prefix, found.samples)
        _, reflection_key = jax.random.split(key)
        wanted = rollout.reflect(other.params, batch, finished, reflection_key)
        own = rollout(policy.params, batch, key)
    np.testing.assert_array_equal(found.samples.tokens, own.samples.tokens)
    for name, probs in found.replies.probs.items():
        np.testing.assert_allclose(probs, wanted.probs[name], atol=1e-6)
        assert np.abs(probs - own.replies.probs[name]).max() > 1e-3


def test_a_judge_with_other_tokens_is_refused(folder):
    policy, mesh = load(folder / "policy"), make_mesh()
    policy.processor.tokenizer.add_tokens(["<another>"])
    config = make_config(folder, str(folder / "judge"))
    with (
        jax.set_mesh(mesh),
        pytest.raises(ConfigError, match=r"reflect\.judge=.*but has other tokens; name a policy"),
    ):
        load_judge(config, "reflect.judge", str(folder / "judge"), policy, print, mesh)
