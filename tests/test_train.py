"""A whole run on a tiny policy: every part of the loop, resuming, counting, refusing."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from ml_collections import ConfigDict
from support import hub, tiny_run
from support.tiny_run import make_folder, read_metrics, write_rows

from emor3_jax import evaluate, prepare
from emor3_jax.account import step_costs
from emor3_jax.compiler.record import Recorder
from emor3_jax.compiler.step import step_programs
from emor3_jax.config import ConfigError, dataset, reward_term
from emor3_jax.data.errors import DataError
from emor3_jax.data.inference_settings import InferenceSettings
from emor3_jax.data.labels import label_set
from emor3_jax.errors import UserError
from emor3_jax.export import export
from emor3_jax.inference.loading import find_policy
from emor3_jax.io import checkpoints
from emor3_jax.io.card import step_of
from emor3_jax.models import load
from emor3_jax.parallel.mesh import make_mesh
from emor3_jax.prepare.shapes import read_policy_shapes
from emor3_jax.push import push
from emor3_jax.rewards import QUESTIONS, Group
from emor3_jax.runtime import job, run
from emor3_jax.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random policy of a hundred thousand parameters and two parquet files."""
    return make_folder(tmp_path_factory.mktemp("run"))


STOP_SIGNALS = signal.SIGTERM, signal.SIGINT


def share_of_length(group: Group) -> jax.Array:
    """A reward term on the device: length over the group's longest."""
    return group.lengths / jnp.max(group.lengths, axis=1, keepdims=True)


def make_config(folder: Path) -> ConfigDict:
    """A run of three steps with a reward term of each kind."""
    config = tiny_run.make_config(folder)
    config.reward.terms.brief = reward_term(weight=-0.2, pattern=r"^.{0,4}$")
    config.reward.terms.length = reward_term(weight=0.01, function=f"{__name__}:share_of_length")
    config.reward.terms.letters = reward_term(weight=0.0, text="support.tiny_run:letters")
    return config


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    workdir, own = folder / "whole", jax.make_mesh((1,), ("own",))
    # As in a notebook: the mesh that was set is set again.
    with jax.set_mesh(own):
        train(make_config(folder), workdir)
        assert jax.sharding.get_mesh() == own
    return workdir


@pytest.fixture(autouse=True)
def _no_mesh_is_left_set():
    yield
    assert jax.sharding.get_mesh().empty


def test_run_leaves_what_the_readme_promises(whole):
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for name in (
        "reward/overall",
        "group/zero_std_fraction",
        "policy/kl",
        "policy/entropy",
        "policy/clip_fraction_low",
        "policy/grad_norm",
        "response/truncated_fraction",
        "time/rollout_s",
        "throughput/tflops_per_s",
        "throughput/tokens_per_s",
        "memory/host_bytes",
    ):
        assert np.isfinite(rows[-1][name]), name
    assert "eval/test/accuracy" in rows[0] and "eval/test/accuracy" in rows[2]
    assert json.loads((whole / "config.json").read_text())["rollout"]["responses"] == 3
    assert "<img" in (whole / "report.html").read_text()
    assert "advantage " in (whole / "samples" / "000001.html").read_text()
    # Before, between and after training.
    steps = re.findall(r">step (\d)</span>", (whole / "report.html").read_text())
    assert steps and steps == ["0", "2", "3"] * (len(steps) // 3)
    before, after = json.loads((whole / "evaluations.json").read_text())
    assert before["test"]["rows"] == after["test"]["rows"] == 6
    trained, base = load(whole / "policy"), load(whole.parent / "policy")
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained.params, base.params)
    assert max(jax.tree.leaves(moved)) > 0
    # What it was asked goes along.
    settings = InferenceSettings.read(whole / "policy")
    assert settings == InferenceSettings.read(whole)
    assert (settings.question, settings.max_tokens) == ("which emotion ?", 8)
    assert settings.labels == label_set("mikels8") and "<step1> seen" in settings.prompt


def test_a_run_and_its_checkpoints_can_be_asked(whole):
    newest, second = find_policy(str(whole)), find_policy(whole / "checkpoints" / "2")
    assert newest.policy.source == whole / "policy" and newest.settings == second.settings
    params = newest.policy.params, second.policy.params
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *params)
    assert max(jax.tree.leaves(moved)) > 0
    with pytest.raises(UserError, match=r"checkpoints/7: no such checkpoint; .* has 2, 3"):
        find_policy(whole / "checkpoints" / "7")


def test_a_checkpoint_is_pushed_as_a_policy(whole, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with hub.running() as there:
        api = HfApi(endpoint=there.address, token=hub.WRITES)
        push(whole / "checkpoints" / "2", "someone/second", api=api)
        push(whole, "someone/newest", api=api)
    second, newest = (there.files[f"someone/{name}"]["main"] for name in ("second", "newest"))
    assert there.commits[0][2] == "Upload the policy whole, step 2"
    assert second.keys() == newest.keys() and "emor3.json" in second
    assert second["model.safetensors"] != newest["model.safetensors"]
    assert newest["model.safetensors"] == (whole / "policy" / "model.safetensors").read_bytes()
    told = second["README.md"].decode()
    assert "to step\n2 of 3" in told and "No evaluation of this step" in told
    assert "| test | accuracy |" in newest["README.md"].decode()


def test_a_checkpoint_is_evaluated_as_training_did(whole, folder):
    config, workdir = make_config(folder), folder / "evaluation"
    config.evaluate.checkpoint = str(whole)
    result = evaluate.main(config, workdir)["test"]
    _, after = json.loads((whole / "evaluations.json").read_text())
    assert result.metrics == pytest.approx(after["test"])
    assert np.sum(result.confusion) == 6
    # What was said in training after its last step is said again, row by row.
    said = (workdir / "predictions" / "test.jsonl").read_text()
    assert said == (whole / "predictions" / "000003" / "test.jsonl").read_text()
    assert len(said.splitlines()) == 6
    assert len((whole / "predictions" / "000002" / "test.jsonl").read_text().splitlines()) == 4
    for name in ("evaluation.md", "evaluation.json", "report.html"):
        assert (workdir / name).is_file() and (whole / name).is_file()


def test_an_earlier_checkpoint_is_evaluated_by_majority(whole, folder):
    config = make_config(folder)
    config.evaluate.checkpoint = str(whole / "checkpoints" / "2")
    config.evaluate.votes, config.evaluate.likelihood = 3, True
    config.evaluate.groups.all = ("test",)
    results = evaluate.main(config, folder / "votes")
    result = results["test"]
    assert results["all"].members == ("test",)
    assert results["all"].metrics["uar"] == result.metrics["uar"]
    lines = (folder / "votes" / "predictions" / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [len(row["responses"]) for row in rows] == [3] * 6
    right = [row["right"] for row in rows]
    assert result.metrics["accuracy"] == pytest.approx(np.mean(right))
    # A random policy boxes no label, so there is nothing to be sure of.
    assert all(row["answer"] or not row["confidence"] for row in rows)
    assert (folder / "votes" / "predictions" / "config.json").is_file()


@pytest.mark.parametrize("place", ["checkpoints/7", "nothing"])
def test_a_checkpoint_that_is_not_there_is_named(whole, folder, place):
    config = make_config(folder)
    config.evaluate.checkpoint = str(whole / place)
    with pytest.raises(ConfigError, match=r"evaluate\.checkpoint=.*checkpoints has (2, 3|none)$"):
        evaluate.main(config, folder / "none")


def test_terms_of_ones_own_are_part_of_the_reward(whole):
    rows = read_metrics(whole)[1:]
    for row in rows:
        own = -0.2 * row["reward/brief"] + 0.01 * row["reward/length"]
        method = 0.8 * row["reward/accuracy"] + 0.1 * row["reward/format"]
        method += 0.05 * (row["reward/coherence"] + row["reward/consistency"])
        assert row["reward/overall"] == pytest.approx(method + own, abs=1e-6)
        assert 0 < row["reward/length"] <= 1
    assert any(row["reward/letters"] > 0 for row in rows)
    assert "eval/test/letters" in read_metrics(whole)[0]


def test_soft_reflection_gives_shares_instead_of_hits(folder):
    config = make_config(folder)
    config.reflect.soft = True
    config.steps = 1
    _, after = train(config, folder / "soft").values()
    (row,) = read_metrics(folder / "soft")[1:]
    for name in ("coherence", "consistency"):
        # 12 responses: a mean of hits is a multiple of 1 / 12.
        assert 0 < row[f"reward/{name}"] < 1 or row["reward/format"] == 0
    method = 0.8 * row["reward/accuracy"] + 0.1 * row["reward/format"]
    method += 0.05 * (row["reward/coherence"] + row["reward/consistency"])
    own = -0.2 * row["reward/brief"] + 0.01 * row["reward/length"]
    assert row["reward/overall"] == pytest.approx(method + own, abs=1e-6)
    assert all("(" in sample.replies["coherence"] for sample in after["test"].samples)


def test_a_third_question_is_a_row_and_a_template(folder, monkeypatch):
    pleasant = QUESTIONS["consistency"]._replace(name="pleasant", with_image=False)
    monkeypatch.setitem(QUESTIONS, "pleasant", pleasant)
    (folder / "pleasant.txt").write_text("is {text} pleasant ?")
    for soft in (False, True):
        config = make_config(folder)
        config.data.templates.pleasant = str(folder / "pleasant.txt")
        config.steps, config.reflect.soft = 1, soft
        workdir = folder / f"third_{soft}"
        train(config, workdir)
        first, row = read_metrics(workdir)
        assert "eval/test/pleasant" in first
        method = 0.8 * row["reward/accuracy"] + 0.1 * row["reward/format"]
        method += 0.1 / 3 * sum(row[f"reward/{name}"] for name in QUESTIONS)
        own = -0.2 * row["reward/brief"] + 0.01 * row["reward/length"]
        assert row["reward/overall"] == pytest.approx(method + own, abs=1e-6)
        predictions = workdir / "predictions" / "000001" / "test.jsonl"
        assert '"pleasant_reply"' in predictions.read_text()
        page, samples = workdir / "report.html", workdir / "samples" / "000001.html"
        assert "<td>test · pleasant</td>" in page.read_text()
        assert f">pleasant {row['reward/pleasant']:.2f}</text>" in page.read_text()
        for file in (page, samples):
            assert "reply to the pleasant question" in file.read_text()
        # Compiled and counted ahead like the others.
        mesh = make_mesh()
        policy, texts = read_policy_shapes(config)
        record = Recorder(mesh, lambda name: False)
        with jax.set_mesh(mesh):
            record.run(step_programs(mesh, config, policy, texts.questions))
        assert step_costs(config, None, None)[2]["pleasant"].tokens > 0


def test_first_update_of_a_batch_is_on_policy(whole):
    """Sampled and scored log-probabilities agree, so no ratio is clipped and the KL begins at 0."""
    first = read_metrics(whole)[1]
    # The mean of two updates, the second of which is one step away.
    assert first["policy/kl"] < 1e-3
    assert first["policy/skipped"] == 0


def test_the_sampler_records_what_scoring_finds(whole, folder):
    assert all(0 < row["policy/sampler_gap"] < 1e-4 for row in read_metrics(whole)[1:])
    config = make_config(folder)
    config.steps, config.policy_update.old_logprobs = 1, "recompute"
    train(config, folder / "recomputed")
    (row,) = read_metrics(folder / "recomputed")[1:]
    assert 0 < row["policy/sampler_gap"] < 1e-4
    assert row["time/old_s"] > 0
    wanted = read_metrics(whole)[1]
    assert row["policy/loss"] == pytest.approx(wanted["policy/loss"], abs=1e-4)


def test_prompts_in_turns_train_as_all_at_once(whole, folder):
    config = make_config(folder)
    config.rollout.slots, config.rollout.refill = 2, 1
    # More steps than there are to trace: the trace ends with the run.
    config.log.profile_steps = 2
    train(config, folder / "turns")
    assert list((folder / "turns" / "profile").rglob("*.trace.json.gz"))
    row, wanted = read_metrics(folder / "turns")[1], read_metrics(whole)[1]
    for name in ("reward/overall", "reward/consistency", "response/length_mean"):
        assert row[name] == pytest.approx(wanted[name], abs=1e-6), name
    assert row["policy/grad_norm"] == pytest.approx(wanted["policy/grad_norm"], rel=1e-3)


def test_bad_rows_are_counted(whole):
    last = read_metrics(whole)[-1]
    assert last["data/unknown_answer"] == 1
    assert last["data/empty_question"] == 1
    assert last["data/unreadable_image"] == 1
    assert last["data/long_question"] == 1


def test_nothing_compiles_after_the_first_pass_over_the_shapes(whole):
    counts = [row["compile/count"] for row in read_metrics(whole)[1:]]
    assert counts[1] == counts[2] > 0


def live_bytes() -> int:
    return sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())


def test_a_stopped_run_goes_on_exactly(folder, whole, monkeypatch):
    freed = []

    def release(tree: Any) -> Any:
        size, before = sum(x.nbytes for x in jax.tree.leaves(tree)), live_bytes()
        shapes = checkpoints.release(tree)
        freed.append((before - live_bytes(), size))
        return shapes

    # Before a checkpoint is read, the state that was initialised is gone.
    monkeypatch.setattr(run, "release", release)
    config = make_config(folder)
    workdir = folder / "stopped"
    config.steps = 2
    train(config, workdir)
    # A line after the checkpoint, as a run that is killed leaves it.
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward/overall": 9}\n{"step": 4, "rew')
    config.steps = 3
    train(config, workdir)
    ((bytes_freed, size),) = freed
    assert bytes_freed == size > 0
    rows, wanted = read_metrics(workdir), read_metrics(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for name in ("reward/overall", "policy/loss", "policy/grad_norm", "response/length_mean"):
        assert rows[-1][name] == wanted[-1][name], name
    ours, theirs = load(workdir / "policy").params, load(whole / "policy").params
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_another_algorithm_goes_on_exactly(folder):
    """ReMax, KL in the reward with a weight that adapts, over-long penalty, constant mean."""
    config = make_config(folder)
    config.data.templates.set, config.reflect.enabled = "tiny_direct", False
    config.reward.format, config.evaluate.reflect = "boxed", True
    config.reward.overlong, config.rollout.resample = 6, 1
    learning = config.policy_update
    learning.advantage, learning.mean, learning.mask_truncated = "remax", "constant", True
    learning.kl, learning.kl_place, learning.kl_coef = "k1", "reward", 0.1
    learning.kl_target, learning.kl_horizon, learning.clip_dual = 1e-3, 12.0, float("inf")
    for name, steps in (("whole", (3,)), ("parts", (2, 3))):
        for count in steps:
            config.steps = count
            train(config, folder / f"remax_{name}")
    rows, wanted = read_metrics(folder / "remax_parts"), read_metrics(folder / "remax_whole")
    first, *_, last = wanted[1:]
    assert first["policy/kl"] == pytest.approx(0, abs=1e-5)
    # 12 responses of a horizon of 12, far under the target.
    assert first["policy/kl_coef"] == pytest.approx(0.1)
    assert wanted[2]["policy/kl_coef"] == pytest.approx(0.08)
    assert first["resample/rounds"] in (1, 2)
    assert "reward/coherence" in first and "eval/test/decoupling" in wanted[0]
    # What a run left out is counted from where it went on.
    skipped = ("time/", "throughput/", "memory/", "compile/", "data/")
    for name, value in last.items():
        if not name.startswith(skipped):
            assert rows[-1][name] == value, name
    ours, theirs = (load(folder / f"remax_{n}" / "policy").params for n in ("parts", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("lora", {"policy.lora_rank": 2, "policy_update.rates.decoder": 2.0}),
        ("average", {"reference.kind": "average", "reference.decay": 0.5}),
    ],
)
def test_adapters_and_a_moving_reference_go_on_exactly(folder, whole, name, fields):
    for part, steps in (("whole", (3,)), ("parts", (2, 3))):
        for count in steps:
            config = make_config(folder)
            config.update_from_flattened_dict({**fields, "steps": count})
            train(config, folder / f"{name}_{part}")
            shutil.rmtree(folder / f"{name}_{part}" / "policy")
    rows, wanted = (read_metrics(folder / f"{name}_{part}") for part in ("parts", "whole"))
    for metric in ("reward/overall", "policy/loss", "policy/kl", "policy/grad_norm"):
        assert rows[-1][metric] == wanted[-1][metric], metric
    # The checkpoint knows what it holds; what is exported has its adapters merged.
    params = [load(export(config, folder / f"{name}_{part}")).params for part in ("parts", "whole")]
    jax.tree.map(np.testing.assert_array_equal, *params)
    base = load(folder / "policy").params
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params[0], base)
    projections = moved["model"]["layers"]["self_attn"]
    if name == "lora":
        assert sum(x > 0 for x in jax.tree.leaves(moved)) == 4
        assert min(projections[x]["kernel"] for x in config.policy.lora_modules) > 0
        # A step of the adapters alone is small, and so is what is kept of it.
        assert wanted[1]["policy/sampler_gap"] < 1e-4
    else:
        # It comes after the policy, which cannot go as far from it as from a frozen one.
        assert 0 < wanted[-1]["policy/kl"] < read_metrics(whole)[-1]["policy/kl"]


def test_the_images_features_are_kept_over_epochs_without_a_trace(folder, whole):
    config = make_config(folder)
    config.reference.image_cache = 10**6
    train(config, folder / "cached")
    rows, wanted = read_metrics(folder / "cached"), read_metrics(whole)
    # 10 usable rows in 3 steps of 4.
    assert rows[-1]["reference/cache_hits"] == 2
    assert rows[-1]["reference/cache_misses"] == 10
    assert 0 < rows[-1]["reference/cache_bytes"] <= 10**6
    for metric in ("policy/loss", "policy/kl", "policy/grad_norm", "reward/overall"):
        assert rows[-1][metric] == wanted[-1][metric], metric


def test_images_that_are_all_unusable_end_a_run_before_it_evaluates(folder, monkeypatch):
    rows = pq.read_table(folder / "test.parquet").to_pylist()
    damaged = [row | {"images": [{"bytes": b"no image", "path": None}]} for row in rows]
    pq.write_table(pa.Table.from_pylist(damaged), folder / "damaged.parquet")
    config = make_config(folder)
    config.data.train.path = str(folder / "damaged.parquet")
    monkeypatch.setattr(run.Evaluator, "__call__", lambda *_, **__: pytest.fail("it evaluates"))
    with pytest.raises(DataError, match="no usable row is left: 6 unreadable_image"):
        train(config, folder / "unusable")


def test_dynamic_sampling_survives_rewards_that_are_all_equal(folder):
    config = make_config(folder)
    # What a random policy writes has no box: without other terms every reward is 0.
    config.reward.terms = ConfigDict()
    config.reflect.enabled, config.rollout.resample, config.steps = False, 2, 2
    assert train(config, folder / "starved")
    for row in read_metrics(folder / "starved")[1:]:
        assert row["resample/rounds"] == 3
        assert row["resample/left"] == 4 and row["resample/dropped"] == 8
        assert row["group/zero_std_fraction"] == 1
        assert np.isfinite(row["policy/loss"]) and row["policy/skipped"] == 0


def test_a_signal_stops_after_the_step_and_keeps_it(folder, monkeypatch):
    config = make_config(folder)
    workdir = folder / "signalled"
    data = prepare.open_data

    def open_and_signal(*args, **options):
        opened = data(*args, **options)
        following = type(opened.train).__next__

        class Signalling(type(opened.train)):
            asked = 0

            def __next__(self):
                # The second batch is read while the first step is computed.
                type(self).asked += 1
                if self.asked == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                return following(self)

        opened.train.__class__ = Signalling
        return opened

    monkeypatch.setattr(prepare, "open_data", open_and_signal)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        assert train(config, str(workdir)) == {}
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert (workdir / "checkpoints" / "1").is_dir()
    # It never came to its end: its policy is exported from the checkpoint.
    assert not (workdir / "policy").exists()
    exported, base = load(export(config, workdir)), load(folder / "policy")
    card = (workdir / "policy" / "README.md").read_text()
    assert step_of(card) == 1 and "No evaluation of this step" in card
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), exported.params, base.params)
    assert max(jax.tree.leaves(moved)) > 0


def test_a_run_is_not_overwritten_nor_begun_again_with_fewer_steps(folder, whole):
    config, before = make_config(folder), (whole / "report.html").read_bytes()
    with pytest.raises(UserError, match="holds a run, whose report would be overwritten"):
        evaluate.main(config, whole)
    config.steps = 2
    with pytest.raises(ConfigError, match=r"steps=2: the run in .* has done 3; give as many"):
        train(config, whole)
    config.steps, config.policy_update.kl_coef = 3, 0.5
    with pytest.raises(UserError, match=r"policy_update.kl_coef: 0.03 before, 0.5 now"):
        train(config, whole)
    assert (whole / "report.html").read_bytes() == before


def test_exporting_a_whole_run_again_keeps_its_card(folder, whole):
    card = (whole / "policy" / "README.md").read_text()
    assert "| test | accuracy |" in card
    export(make_config(folder), whole)
    assert (whole / "policy" / "README.md").read_text() == card


def test_exporting_a_run_without_checkpoint_is_refused(folder):
    with pytest.raises(UserError, match="train first"):
        export(make_config(folder), folder / "empty")


@pytest.mark.parametrize(
    ("field", "value", "error", "said"),
    [
        ("data.train.path", "/no/such.parquet", DataError, "no file matches"),
        ("data.train.labels", "mikels9", DataError, "mikels8"),
        ("data.train.kind", "csv", ConfigError, "config.data.train.kind='csv'"),
        ("policy.path", "/no/policy", ConfigError, "config.policy.path"),
        ("policy_update.prompts", 3, ConfigError, "must divide rollout.prompts=4"),
        ("rollout.top_p", 0.0, ConfigError, "(0, 1]"),
        ("policy.lora_rank", 99, ConfigError, "under the rank 99"),
    ],
)
def test_a_config_that_cannot_run_stops_before_any_compile(folder, field, value, error, said):
    config = make_config(folder)
    with config.unlocked():
        config.update_from_flattened_dict({field: value})
    counter, handlers = job.CompileCounter(), [signal.getsignal(n) for n in STOP_SIGNALS]
    with pytest.raises(error) as caught:
        train(config, folder / "refused")
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == handlers
    assert said in str(caught.value)
    assert counter.count == 0


def test_no_usable_row_stops_before_any_compile(folder):
    write_rows(folder / "none.parquet", 3, 2)
    config = make_config(folder)
    config.data.train = dataset(
        kind="parquet", path=str(folder / "none.parquet"), labels="joy,envy"
    )
    with pytest.raises(DataError, match="unknown_answer"):
        train(config, folder / "refused")
