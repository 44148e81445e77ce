"""Who is asked about a response: the policy, its reference, or a policy of its own."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from support import tiny_run
from support.tiny_run import make_folder, read_metrics, write_policy
from transformers import PreTrainedTokenizerBase

from emor3_jax import evaluate, prepare
from emor3_jax.compiler.record import Recorder
from emor3_jax.compiler.step import step_programs
from emor3_jax.config import ConfigError
from emor3_jax.io import report
from emor3_jax.models import LoadedPolicy, load, save
from emor3_jax.models.tokenizer import save_tokenizer
from emor3_jax.parallel.mesh import make_mesh, shard_batch
from emor3_jax.parallel.program import Program
from emor3_jax.prepare.judge import keeps_reference, load_judge
from emor3_jax.prepare.shapes import read_policy_shapes
from emor3_jax.rollout.engine import Finished
from emor3_jax.rollout.rollout import prefill
from emor3_jax.train import train
from emor3_jax.types import Samples

COHERENCE = "<step1> a dark wood </step1> <step2> one feels uneasy </step2>"
CONSISTENCY = "<step1> a dark wood </step1>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Beside the policy there are another one of the same tokens, and two of the other family.

    `judge` reads what the policy reads; `qwen3` the same tokens; `foreign` has tokens of its own.
    """
    folder = make_folder(tmp_path_factory.mktemp("judge"))
    write_policy(folder / "qwen3", "qwen3_vl")
    write_policy(folder / "foreign", "qwen3_vl", words=400)
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
    title = "<title>EMO-R3: reference, reflections asked of reference</title>"
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


@pytest.mark.parametrize("name", ["qwen3", "foreign"])
def test_a_judge_of_another_family_is_asked_as_if_it_were_the_policy(folder, name):
    """Its replies about the same texts are those that a run of its own would get."""
    config = make_config(folder, str(folder / name))
    own_config, mesh = make_config(folder, "policy"), make_mesh()
    own_config.policy.path = str(folder / name)
    # Its prompts are longer in its tokens.
    own_config.data.prompt_lengths = (256,)
    policy, other = load(folder / "policy"), load(folder / name)
    ours, theirs = (each.processor.tokenizer for each in (policy, other))
    with jax.set_mesh(mesh):
        judge = load_judge(config, "reflect.judge", str(folder / name), policy, print, mesh)
        judges = prepare.JudgeProcessors(training=judge.processor)
        data = prepare.open_data(config, policy, mesh, judges=judges)
        labels = data.labels["train"]
        rollout = prepare.make_rollout(config, policy, labels, mesh, judge.processor)
        assert (rollout.reflection.retokenizer is None) == (name == "qwen3")
        prompts, key = next(data.train), jax.random.key(3)
        batch, rows = shard_batch(prompts.batch, mesh), np.arange(len(prompts.ids))
        asked = Finished(rows, None, write(ours, COHERENCE, " <step3> so </step3>"))
        found = rollout.reflect({}, batch, asked, key, judge)
        own_data = prepare.open_data(own_config, other, mesh)
        own = prepare.make_rollout(own_config, other, labels, mesh)
        own_batch = shard_batch(own_data.train.of_rows(prompts.ids).batch, mesh)
        prefix = prefill(other.params, own_batch, policy=other.policy)
        # The judged text begins and ends between two tokens.
        texts = {
            "coherence": write(theirs, COHERENCE, " <step3> so </step3>"),
            "consistency": write(theirs, CONSISTENCY, " <step2> one feels uneasy </step2>"),
        }
        if name == "qwen3":
            texts = dict.fromkeys(texts, asked.samples)
        for question, samples in texts.items():
            wanted = own.reflect(other.params, own_batch, Finished(rows, prefix, samples), key)
            np.testing.assert_array_equal(found.lengths[question], wanted.lengths[question])
            assert found.found[question].all()
            probs = found.probs[question]
            np.testing.assert_allclose(probs, wanted.probs[question], atol=1e-6)
            assert np.ptp(probs[:, 0], axis=-1).min() > 1e-3


def write(tokenizer: PreTrainedTokenizerBase, *texts: str) -> Samples:
    """One response to each of four prompts, of texts that are tokenised apart."""
    row = [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)]
    tokens = np.zeros((4, 1, 128), np.int32)
    tokens[..., : len(row)] = row
    lengths = np.full((4, 1), len(row), np.int32)
    return Samples(tokens, np.zeros(tokens.shape, np.float32), lengths, np.ones((4, 1), bool))


def test_what_a_judge_reads_is_foretold(folder):
    """The compiler is shown images, texts and questions in the sizes that a run gives them."""
    config, mesh = make_config(folder, str(folder / "foreign")), make_mesh()
    policy, other = load(folder / "policy"), load(folder / "foreign")
    names: dict[str, Program] = {}
    record = Recorder(mesh, lambda name: False)
    with jax.set_mesh(mesh):
        shapes, texts = read_policy_shapes(config)
        programs, sent = step_programs(mesh, config, shapes, texts.questions), None
        with contextlib.suppress(StopIteration):
            while True:
                program = programs.send(sent)
                names[program.name] = program
                sent = record(program)
        judges = prepare.JudgeProcessors(training=other.processor)
        data = prepare.open_data(config, policy, mesh, judges=judges)
        rollout = prepare.make_rollout(config, policy, data.labels["train"], mesh, other.processor)
        real = next(data.train).batch.judge_prefix
    _, seen = names["judge.prefill"].args
    assert [x.shape for x in jax.tree.leaves(seen)] == [x.shape for x in jax.tree.leaves(real)]
    for prompted in rollout.reflection.questions:
        _, params, asked, *_ = names[prompted.question.name].args
        assert params is names["judge.prefill"].args[0]
        around = prompted.head.shape, prompted.tail.shape
        assert (asked.head.shape, asked.tail.shape) == around
        # The longer of text_lengths and rollout.max_tokens, in tokens of the judge.
        assert asked.text.shape == (4, 3, 8)
    own = seen.images.patches.shape[1:]

    def images(name: str) -> int:
        leaves = jax.tree.leaves((names[name].alive, names[name].args))
        arrays = {id(x): x for x in leaves if np.ndim(x) == 5}
        return sum(x.shape[1:] == own for x in arrays.values())

    # While it is asked: those of the policy and of the judge. They are alike in shape here. Then
    # only what is learned from, and in an update the next batch too.
    assert [images(name) for name in ("decode", "coherence", "reference", "update")] == [2, 2, 1, 3]


def test_a_policy_learns_from_a_judge_of_another_family(folder):
    config = make_config(folder, str(folder / "foreign"))
    config.steps, config.evaluate.sets = 1, ConfigDict()
    # Words of a label take more of its tokens.
    config.reflect.soft, config.reflect.max_tokens = False, 16
    train(config, folder / "run")
    row = read_metrics(folder / "run")[-1]
    assert row["reflect/texts_cut"] == 0 and np.isfinite(row["policy/loss"])
    title = f"Samples of step 1, reflections asked of {folder / 'foreign'}"
    assert title in (folder / "run" / "samples" / "000001.html").read_text()


def test_a_judge_that_cannot_be_asked_is_refused(folder):
    """Before anything is compiled, with the way out."""
    policy, mesh, path = load(folder / "policy"), make_mesh(), str(folder / "qwen3")
    config = make_config(folder, path)
    config.data.min_pixels, config.data.max_pixels = 336**2, 336**2
    rule = r"reflect\.judge_windows=\(1,\): reflect\.judge='.*qwen3' scales .* take 9 windows; give"
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match=rule):
        load_judge(config, "reflect.judge", path, policy, print, mesh)
    config = make_config(folder, path)
    broken = load(folder / "qwen3").processor.tokenizer
    broken.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    shutil.copytree(folder / "qwen3", folder / "broken")
    save_tokenizer(broken, folder / "broken")
    path = str(folder / "broken")
    rule = r"evaluate\.judge='.*broken': cannot be asked about images and texts: .*; name another"
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match=rule):
        load_judge(config, "evaluate.judge", path, policy, print, mesh)


def test_a_judge_that_thinks_aloud_is_warned_of(folder, caplog):
    policy, mesh, path = load(folder / "policy"), make_mesh(), folder / "thinking"
    tokenizer = load(folder / "foreign").processor.tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = before.replace("assistant\\n'", "assistant\\n<think>\\n'")
    assert tokenizer.chat_template != before
    shutil.copytree(folder / "foreign", path)
    save_tokenizer(tokenizer, path)
    with jax.set_mesh(mesh):
        config = make_config(folder, str(path))
        load_judge(config, "reflect.judge", str(path), policy, print, mesh)
    assert f"reflect.judge={path} opens <think> for each reply" in caplog.text


def test_the_title_says_who_was_asked():
    assert report.judged_by("policy") == report.judged_by("policy", "policy") == ""
    assert report.judged_by("reference", "") == ", reflections asked of reference"
    assert report.judged_by("a/b", "a/b") == ", reflections asked of a/b"
    both = ", reflections asked of the policy in training, of reference in evaluation"
    assert report.judged_by("reference", "policy") == both
