"""Supervised fine-tuning: what is learned of which row, and whole runs."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from support.tiny_run import make_config, make_folder, read_metrics, write_rows

from emor3_jax import prepare
from emor3_jax.config import ConfigError, dataset
from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import label_set
from emor3_jax.data.sources import Texts
from emor3_jax.embedded.emoscenes import scene, words
from emor3_jax.embedded.emoscenes.responses import PHRASINGS, right_responses
from emor3_jax.models import load
from emor3_jax.prepare.responses import Responses
from emor3_jax.sft import Examples, train
from emor3_jax.types import Batch

LABELS = label_set("mikels8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny policy; rows with two responses, one, none, one that is too long."""
    folder = make_folder(tmp_path_factory.mktemp("sft"))
    said = [["it feels sad", "a viewer feels"], ["afraid"], None, ["sad " * 40]]
    said += [[f"it feels {word}"] for word in ("afraid", "lonely", "happy", "gloomy")]
    write_rows(folder / "said.parquet", len(said), 3, responses=said)
    return folder


def make_sft_config(folder: Path, target: str) -> ConfigDict:
    config = make_config(folder)
    config.sft.target = target
    config.reflect.enabled = False
    config.policy_update.learning_rate, config.policy_update.warmup_steps = 2e-2, 0
    config.policy_update.entropy, config.policy_update.schedule = False, "constant"
    if target == "response":
        config.data.train = dataset(kind="parquet", path=str(folder / "said.parquet"))
    return config


class Rows(NamedTuple):
    """The part of `prepare.Data` that examples read."""

    labels: dict[str, tuple[str, ...]]
    responses: Responses | None


def make_batch(answers) -> Batch:
    """A batch of which examples read the answers alone."""
    return Batch(*[None] * 6, answers=np.asarray(answers), grades=None, weight=None)


@pytest.fixture(scope="module")
def make_examples(folder) -> Callable[..., Examples]:
    policy = load(folder / "policy")

    def make(target: str, rows=(), **fields) -> Examples:
        config = make_sft_config(folder, target)
        config.update_from_flattened_dict(fields)
        responses = Responses(config, policy) if target == "response" else None
        for row in rows:
            responses.read(row)
        return Examples(config, policy, Rows({"train": LABELS}, responses))

    return make


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load(folder / "policy").processor.tokenizer


def test_labels_alone(make_examples, tokenizer):
    given = make_examples("label").experience(("a", "b"), make_batch([0, 7])).samples
    assert given.tokens.shape == (2, 1, 8)
    for i, label in ((0, "amusement"), (1, "sadness")):
        text = tokenizer.decode(given.tokens[i, 0, : given.lengths[i, 0]])
        assert text == f"\\boxed{{{label}}}<|im_end|>"
    assert given.ended.all() and not given.tokens[0, 0, given.lengths[0, 0] :].any()
    with pytest.raises(ConfigError, match=r"rollout\.max_tokens=2: a boxed label takes \d tokens"):
        make_examples("label", **{"rollout.max_tokens": 2})


def test_responses_of_rows(make_examples, tokenizer):
    rows = [
        Texts("?", "awe", "two", responses=("sad", "it feels sad")),
        Texts("?", "awe", "none"),
        Texts("?", "awe", "long", responses=("sad " * 40, "afraid")),
        Texts("?", "awe", "special", responses=("sad<|image_pad|>",)),
    ]
    found = make_examples("response", rows, **{"sft.responses": 2})
    given = found.experience(("special", "two", "long", "none"), make_batch([0] * 4)).samples
    assert given.tokens.shape == (4, 2, 8)
    assert (given.lengths > 0).tolist() == [[False] * 2, [True] * 2, [True, False], [False] * 2]
    assert tokenizer.decode(given.tokens[1, 1][: given.lengths[1, 1]]) == "it feels sad<|im_end|>"
    assert found.counters() == {
        "data/long_response": 1,
        "data/special_token_in_response": 1,
    }
    assert found.describe() == "learning 3 responses to 2 rows"
    # At most so many of each row.
    assert (
        make_examples("response", rows, **{"sft.responses": 1})
        .describe()
        .startswith("learning 1 resp")
    )


def test_sft_batches_without_a_token_to_learn_are_not_drawn(folder):
    """Of eight rows, one has no response and one a response that is too long."""
    config = make_sft_config(folder, "response")
    config.rollout.prompts, policy = 2, load(folder / "policy")
    data = prepare.open_data(config, policy, imitate=True)
    drawn = {row_id for _ in range(9) for row_id in next(data.train).ids}
    assert len(drawn) == 6 and drawn == set(data.responses.of_row)
    assert data.counters() == {"data/no_response": 2}
    # Where responses are sampled, all rows are asked.
    assert prepare.open_data(config, policy).train.rows == 8
    config.rollout.max_tokens = 1
    with pytest.raises(DataError, match=r"8 no_response \(there is no response that can be learn"):
        prepare.open_data(config, policy, imitate=True)


def test_a_right_response_names_every_cue_and_boxes_the_label():
    drawn = scene.sample("drawn", np.random.default_rng(0))
    found = right_responses(drawn.to_json(), "train_000001")
    assert len(found) == PHRASINGS and found == right_responses(drawn.to_json(), "train_000001")
    assert found != right_responses(drawn.to_json(), "train_000002")
    for text in found:
        assert text.startswith(f"<step1> {words.render(drawn.cues())} </step1>")
        assert text.endswith(f"\\boxed{{{drawn.label}}}")


@pytest.mark.parametrize("target", ["label", "response"])
def test_a_run_learns_and_goes_on_exactly(folder, target):
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for count in steps:
            config = make_sft_config(folder, target)
            config.steps = count
            found = train(config, folder / f"{target}_{name}")
    assert set(found) == {"before", "after"}
    rows, wanted = (read_metrics(folder / f"{target}_{n}") for n in ("parts", "whole"))
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for name in ("policy/loss", "policy/grad_norm", "response/length_mean", "policy/perplexity"):
        assert rows[-1][name] == wanted[-1][name], name
    assert wanted[-1]["policy/loss"] < 0.8 * wanted[1]["policy/loss"]
    if target == "response":
        assert wanted[-1]["data/no_response"] == 2 and wanted[-1]["data/long_response"] == 1
    ours, theirs = (load(folder / f"{target}_{n}" / "policy").params for n in ("parts", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert (folder / f"{target}_whole" / "report.html").is_file()


def test_emoscenes_says_what_is_right_only_where_asked(tmp_path, monkeypatch):
    from emor3_jax.embedded.emoscenes import builder

    counts = {"train": 2}
    original = builder.prepare
    monkeypatch.setattr(
        builder,
        "prepare",
        lambda folder, size, splits: original(folder, size, counts, splits=splits),
    )
    config = make_sft_config(tmp_path, "response")
    config.data.train, config.data.folder = dataset(split="train"), str(tmp_path)
    for target, there in (("response", PHRASINGS), ("label", 0)):
        config.sft.target = target
        source, _ = prepare.open_source(config, "data.train", config.data.train)
        assert [len(texts.responses) for texts in source.texts()] == [there] * 2
