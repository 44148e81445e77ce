"""From a config to the policy of a run."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from support import layouts, tiny

from configs import cpu_demo, paper
from emor3_jax import prepare
from emor3_jax.config import ConfigError, dataset, default
from emor3_jax.data.errors import DataError
from emor3_jax.data.generic import FilesSource
from emor3_jax.data.labels import LABEL_SETS, label_set
from emor3_jax.data.sources import Texts
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models import LoadedPolicy, save
from emor3_jax.models.params import cast_matrices
from emor3_jax.models.processor import ImageSettings, Processor
from emor3_jax.parallel.mesh import make_mesh
from emor3_jax.prepare.checks import validate
from emor3_jax.prepare.sources import SOURCES, SourceContext
from emor3_jax.runtime import job


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    policy = tiny.make_policy()
    processor = Processor(
        train_tokenizer(["a street"], 300),
        ImageSettings(patch_size=4, min_pixels=256, max_pixels=1024),
        policy.layout,
    )
    folder = tmp_path_factory.mktemp("policy")
    save(LoadedPolicy(policy, tiny.strong_params(policy), processor), folder)
    return folder


def load(folder, **data) -> LoadedPolicy:
    config = default()
    config.policy.path = str(folder)
    config.data.update(data)
    return prepare.load_policy(config, print, make_mesh())


def test_image_sizes_are_the_folders_unless_the_config_says_others(folder):
    images = load(folder).processor.images
    assert (images.min_pixels, images.max_pixels) == (256, 1024)
    images = load(folder, max_pixels=512).processor.images
    assert (images.min_pixels, images.max_pixels) == (256, 512)
    assert images.patch_size == 4
    with pytest.raises(ConfigError, match=r"data\.min_pixels=2000: is over data\.max_pixels=1024"):
        load(folder, min_pixels=2000)


def test_parameters_lie_on_the_mesh(folder):
    policy = load(folder)
    assert policy.params["model"]["norm"]["scale"].sharding.mesh.shape["fsdp"] == 1
    assert policy.policy.compute.attention == "xla"


def test_matrices_beside_adapters_are_in_the_compute_type(folder):
    config = default()
    config.policy.path, config.policy.dtype = str(folder), "bfloat16"
    whole = prepare.load_policy(config, print, make_mesh()).params
    config.policy.lora_rank = 2
    base = prepare.load_policy(config, print, make_mesh()).params
    jax.tree.map(np.testing.assert_array_equal, base, cast_matrices(whole, jnp.dtype("bfloat16")))
    assert {x.dtype.name for x in jax.tree.leaves(whole)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(base)} == {"float32", "bfloat16"}
    config.policy.dtype = "float32"
    found = prepare.load_policy(config, print, make_mesh()).params
    jax.tree.map(np.testing.assert_array_equal, found, whole)


@pytest.mark.parametrize(
    ("chosen", "dtype", "platform", "found"),
    [
        ("auto", "bfloat16", "tpu", "splash"),
        ("auto", "float32", "tpu", "splash"),
        ("auto", "bfloat16", "gpu", "cudnn"),
        ("auto", "float32", "gpu", "xla"),
        ("auto", "bfloat16", "cpu", "xla"),
        ("xla", "bfloat16", "tpu", "xla"),
        ("splash", "bfloat16", "tpu", "splash"),
    ],
)
def test_attention_of_a_platform(chosen, dtype, platform, found):
    config = default()
    config.policy.attention, config.policy.dtype = chosen, dtype
    assert prepare.attention_backend(config, platform) == found


def test_a_kernel_of_another_platform_is_refused():
    config = default()
    config.policy.attention = "splash"
    with pytest.raises(ConfigError, match=r"policy\.attention='splash': .*'tpu', this is 'cpu'"):
        prepare.attention_backend(config, "cpu")


@pytest.mark.parametrize(
    ("chosen", "platform", "found"),
    [
        ("auto", "tpu", "ragged"),
        ("auto", "gpu", "xla"),
        ("auto", "cpu", "xla"),
        ("xla", "tpu", "xla"),
        ("ragged", "tpu", "ragged"),
    ],
)
def test_attention_of_decoded_tokens(chosen, platform, found):
    config = default()
    config.policy.decode_attention = chosen
    assert prepare.decode_backend(config, platform) == found


def test_the_kernel_of_decoded_tokens_is_refused_elsewhere_and_for_odd_lengths():
    config = default()
    config.policy.decode_attention = "ragged"
    validate(config)
    with pytest.raises(ConfigError, match=r"policy\.decode_attention='ragged': .*this is 'gpu'"):
        prepare.decode_backend(config, "gpu")
    config.rollout.max_tokens = 1000
    with pytest.raises(ConfigError, match=r"policy\.decode_attention='ragged': .*multiples"):
        validate(config)


def write_folders(root: Path, labels: Sequence[str], count: int) -> None:
    for number, label in enumerate(labels):
        (root / label).mkdir(parents=True)
        for i in range(count):
            grey = 10 * number + i
            Image.new("RGB", (20, 20), (grey, grey, grey)).save(root / label / f"{i}.png")


def opened(config: ConfigDict, folder: Path) -> prepare.Data:
    config.policy.path = str(folder)
    config.data.prompt_lengths, config.data.image_windows = (2000,), (4,)
    config.rollout.prompts = 6
    policy = load(folder)
    # The tiny policy's ids are its own; only that of the image matters here.
    image = policy.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    shapes = dataclasses.replace(policy.shapes, image_token_id=image)
    known = dataclasses.replace(policy.policy, shapes=shapes)
    processor = Processor(policy.processor.tokenizer, policy.processor.images, known.layout)
    return prepare.open_data(config, LoadedPolicy(known, policy.params, processor))


def test_a_set_is_put_into_the_labels_that_the_config_names(tmp_path):
    write_folders(tmp_path / "faces", LABEL_SETS["fer7"], 2)
    config = default()
    described = dataset(kind="folders", path=str(tmp_path / "faces"), split="whole")
    source, labels = prepare.open_source(config, "data.train", described)
    assert label_set(labels) == tuple(sorted(LABEL_SETS["fer7"]))
    described.labels = "polarity2"
    source, labels = prepare.open_source(config, "data.train", described)
    assert labels == "polarity2"
    answers = {texts.id.split("/")[0]: texts.answer for texts in source.texts()}
    # Neutral has no side, so its rows keep a label that is counted as unknown.
    assert answers["happiness"] == "positive" and answers["fear"] == "negative"
    assert answers["neutral"] == "neutral"
    described.labels = "calm,tense"
    with pytest.raises(DataError, match="no counterpart"):
        prepare.open_source(config, "data.train", described)


def test_an_unknown_kind_names_all_kinds(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.train\.kind='csv': .*emoset.*huggingface"):
        prepare.open_source(default(), "data.train", dataset(kind="csv"))
    with pytest.raises(
        DataError, match=r"config\.data\.train: path='': there is no such folder\. EmoSet-118K"
    ):
        prepare.open_source(default(), "data.train", dataset(kind="emoset"))


def test_parquet_needs_a_path():
    with pytest.raises(ConfigError, match=r"evaluate\.sets\.a\.path='': name parquet files"):
        prepare.open_source(default(), "evaluate.sets.a", dataset(kind="parquet"))


def test_a_row_of_the_table_makes_a_kind_of_data(monkeypatch, tmp_path):
    seen = []

    def open_calm(described: ConfigDict, run: SourceContext):
        seen.append(run)
        (tmp_path / "calm.png").touch()
        texts = [Texts(described.question, "calm", "row")]
        return FilesSource("calm", [tmp_path / "calm.png"], texts), "calm,tense"

    monkeypatch.setitem(SOURCES, "calm", open_calm)
    config = default()
    config.data.train = dataset(kind="calm", question="which ?")
    config.sft.target = "response"
    validate(config)
    source, labels = prepare.open_source(config, "data.train", config.data.train)
    assert labels == "calm,tense"
    assert [texts.question for texts in source.texts()] == ["which ?"]
    assert seen == [SourceContext("data.train", "runs/data", 112, responses=True)]


def test_training_sets_are_mixed_in_the_labels_of_the_first(folder, tmp_path):
    write_folders(tmp_path / "six", LABEL_SETS["emotion6"], 2)
    write_folders(tmp_path / "seven", LABEL_SETS["fer7"], 1)
    config = default()
    six = dataset(kind="folders", path=str(tmp_path / "six"), split="whole", labels="emotion6")
    seven = dataset(kind="folders", path=str(tmp_path / "seven"), split="whole", weight=0.5)
    config.data.train, config.data.mix.faces = six, seven
    data = opened(config, folder)
    # Happiness is joy by another name; neutral is no label of emotion6.
    assert data.train.rows == 12 + 6 and data.labels == {"train": LABEL_SETS["emotion6"]}
    assert data.train.stats.counts()["unknown_answer"] == 1
    names = [row_id for _ in range(10) for row_id in next(data.train)[1]]
    assert sum(name.startswith("train/") for name in names) == 40
    assert data.image("train")(names[0]).startswith(b"\x89PNG")
    assert data.counters() == {"data/unknown_answer": 1.0}


def test_a_subset_is_drawn_by_the_seed_and_its_ids_are_kept(folder, tmp_path):
    write_folders(tmp_path / "six", LABEL_SETS["emotion6"], 4)
    config = default()
    config.data.train = dataset(
        kind="folders", path=str(tmp_path / "six"), split="whole", subset=12
    )
    data = opened(config, folder)
    assert data.train.rows == 12
    job.keep_config(config, tmp_path)
    ids = (tmp_path / "subsets" / "train.txt").read_text().split()
    assert sorted(ids) == sorted(texts.id for texts in data.sources["train"].texts())
    counts = Counter(row_id.split("/")[0] for row_id in ids)
    assert set(counts.values()) == {2} and len(counts) == 6
    # The list gives another run the same rows, whatever its seed.
    config.seed, config.data.train.subset = 5, 0
    config.data.train.ids = str(tmp_path / "subsets" / "train.txt")
    again = opened(config, folder)
    assert [t.id for t in again.sources["train"].texts()] == ids
    config.data.train.ids, config.data.train.subset = "", 12
    other = {t.id for t in opened(config, folder).sources["train"].texts()}
    assert len(other) == 12 and other != set(ids)


@pytest.mark.parametrize("field", ["rollout.resample", "reference.image_cache"])
def test_what_works_on_one_host_is_refused_on_several(monkeypatch, field):
    config = default()
    job.check_hosts(config)
    config.update_from_flattened_dict({field: 2})
    job.check_hosts(config)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=rf"config\.{field}=2: works on one host alone"):
        job.check_hosts(config)


def test_evaluation_on_training_rows_is_said(folder, tmp_path, caplog):
    write_folders(tmp_path / "six", LABEL_SETS["emotion6"], 12)
    write_folders(tmp_path / "other", LABEL_SETS["emotion6"], 2)

    def described(name: str = "six", **fields: str) -> ConfigDict:
        return dataset(kind="folders", path=str(tmp_path / name), **fields)

    config = default()
    config.data.train = described(split="whole", subset=12, subset_mix="natural")
    config.evaluate.sets = ConfigDict()
    config.evaluate.sets.same = described("../" + tmp_path.name + "/six", split="whole")
    config.evaluate.sets.other = described("other", split="whole")
    data = opened(config, folder)
    assert data.train.rows == 12
    assert (
        "config.evaluate.sets.same: 12 of 72 rows are also rows of config.data.train" in caplog.text
    )
    assert "sets.other" not in caplog.text
    caplog.clear()
    config.data.train, config.evaluate.sets.same = described(split="train"), described(split="test")
    opened(config, folder)
    assert "are also rows" not in caplog.text


def test_a_subset_has_a_seed_of_its_own(tmp_path):
    write_folders(tmp_path / "six", LABEL_SETS["emotion6"], 12)
    described = dataset(kind="folders", path=str(tmp_path / "six"), split="whole", subset=12)
    config, found = default(), []
    for seed, own in ((0, 5), (1, 5), (5, -1), (0, -1)):
        config.seed, described.subset_seed = seed, own
        source, _ = prepare.open_source(config, "evaluate.sets.a", described)
        found.append([texts.id for texts in source.texts()])
    assert found[0] == found[1] == found[2] != found[3]


def test_texts_may_spell_labels_in_any_way(tmp_path):
    rows = [{"image": "x.png", "label": name} for name in ("Happy", "angry", "sad", "bored")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = dataset(kind="jsonl", path=str(tmp_path / "a.jsonl"), labels="fer7")
    source, _ = prepare.open_source(default(), "data.train", described)
    assert [t.answer for t in source.texts()] == ["happiness", "anger", "sadness", "bored"]


def test_a_field_that_would_do_nothing_is_refused(tmp_path):
    for fields, message in (
        (
            {"kind": "folders", "columns": "image:photo"},
            "columns='image:photo': names columns, which",
        ),
        (
            {"kind": "parquet", "label": "six"},
            "label='six': chooses a label rule of a named data set",
        ),
        (
            {"kind": "emoset", "subset_mix": "even"},
            "subset_mix='even': must be one of class, natural",
        ),
    ):
        with pytest.raises(ConfigError, match=rf"data\.train\.{message}"):
            prepare.open_source(default(), "data.train", dataset(**fields))


def test_int8_weights_are_for_training_alone_and_want_a_correction(folder, caplog, monkeypatch):
    monkeypatch.setattr("emor3_jax.prepare.rollout._scorer", lambda *args: None)
    config, labels, mesh = default(), ("joy", "fear"), make_mesh()
    config.policy.path = str(folder)
    policy = prepare.read_policy(config, print)
    policy = dataclasses.replace(policy, policy=tiny.make_policy(vocab_size=320))
    config.reflect.enabled, config.reward.table_cache = False, ""
    made = prepare.make_rollout(config, policy, labels, mesh)
    assert not made.int8 and not caplog.records
    config.rollout.weight_dtype = "int8"
    assert prepare.make_rollout(config, policy, labels, mesh).int8
    (warned,) = caplog.records
    assert "rollout.weight_dtype='int8'" in warned.message
    assert "policy_update.correction='off'" in warned.message
    caplog.clear()
    update = config.policy_update
    update.old_logprobs, update.correction = "recompute", "token_truncate"
    assert prepare.make_rollout(config, policy, labels, mesh).int8 and not caplog.records
    # An evaluation is of the policy as it is saved.
    assert not prepare.make_evaluation_rollout(config, policy, labels, mesh).int8


def test_a_rate_of_a_merger_without_adapters_is_refused(folder):
    config, mesh = default(), make_mesh()
    config.policy.path = str(folder)
    config.policy.lora_rank, config.policy_update.rates.merger = 2, 2.0
    config.policy.lora_modules = ("visual/qkv",)
    validate(config)
    policy = prepare.load_policy(config, print, mesh)
    policy = dataclasses.replace(policy, policy=tiny.make_policy(vocab_size=320))
    with pytest.raises(ConfigError, match=r"rates\.merger=2\.0: .*'visual/qkv',\) trains; leave"):
        prepare.make_learner(config, policy, mesh)
    config.policy.lora_modules = ("visual/mlp_0",)
    prepare.make_learner(config, policy, mesh)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_of_json_lines_is_honoured_or_refused(tmp_path, split):
    rows = [{"image": "x.png", "label": "joy", "split": name} for name in ("train", "dev")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = dataset(kind="jsonl", path=str(tmp_path / "a.jsonl"), labels="emotion6")
    assert len(prepare.open_source(default(), "data.train", described)[0]) == 2
    described.split = split
    if split == "train":
        assert len(prepare.open_source(default(), "data.train", described)[0]) == 1
    else:
        with pytest.raises(DataError, match=r"split='test': .* its lines are of dev, train"):
            prepare.open_source(default(), "data.train", described)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (
            {"all": ("emoscenes", "nothing")},
            r"groups\.all=.*names of evaluate\.sets: emoscenes, sh",
        ),
        ({"all": ()}, r"groups\.all=\(\): must be a tuple of names"),
        ({"all": "emoscenes"}, r"groups\.all='emoscenes': must be a tuple of names"),
        ({"shifted": ("emoscenes",)}, r"groups\.shifted=.*has the name of a set"),
    ],
)
def test_groups_name_evaluation_sets(groups, said):
    config = cpu_demo.get_config()
    config.evaluate.groups = ConfigDict({"both": ("emoscenes", "shifted")})
    validate(config)
    config.evaluate.groups = ConfigDict(groups)
    with pytest.raises(ConfigError, match=said):
        validate(config)


def test_numbers_of_rows_are_read_where_the_template_asks_for_them():
    config = cpu_demo.get_config()
    values = (("valence", 6.5), ("neutral", 0.25)), ()
    texts = [Texts("?", "joy", str(i), values=x) for i, x in enumerate(values)]
    source = SimpleNamespace(texts=lambda: texts)
    assert prepare.stated_values(config, source) == {}
    config.data.templates.set = "valence_arousal"
    assert prepare.stated_values(config, source) == {"0": {"valence": 6.5}}


def test_the_papers_sets_are_read_from_their_folders(tmp_path):
    layouts.emoset(tmp_path / "EmoSet", {"train": 24, "test": 16})
    six = LABEL_SETS["emotion6"]
    shares = [[0.0] * 7 for _ in six]
    for number in range(6):
        # The largest share is that of another emotion than the keyword.
        shares[number][(number + 1) % 6] = 1.0
    rows = [(f"{six[n]}/{i}.jpg", shares[n]) for n in range(6) for i in range(10)]
    layouts.emotion6(tmp_path / "Emotion6", rows)
    layouts.classes(tmp_path / "WebEmo" / "test25", [str(n) for n in range(25)], 1)
    config = paper.get_config("emoset")
    config.data.folder = str(tmp_path / "data")
    sets = {"data.train": config.data.train}
    sets |= {f"evaluate.sets.{name}": each for name, each in config.evaluate.sets.items()}
    folders = {"emoset": "EmoSet", "emotion6": "Emotion6", "webemo": "WebEmo"}
    found = {}
    for field, each in sets.items():
        each.path = str(tmp_path / folders[each.kind])
        if each.subset:
            each.subset = 12
        source, labels = prepare.open_source(config, field, each)
        found[field] = len(source), labels, list(source.texts())
    assert [(n, labels) for n, labels, _ in found.values()] == [
        (12, "mikels8"),
        (12, "mikels8"),
        (18, "emotion6"),
        (12, "webemo7"),
    ]
    emotion6 = found["evaluate.sets.emotion6"][2]
    assert all(texts.answer == texts.id.partition("/")[0] for texts in emotion6)
    assert {t.answer for t in found["evaluate.sets.webemo"][2]} <= set(LABEL_SETS["webemo7"])
    config.seed = 7
    again, _ = prepare.open_source(config, "data.train", config.data.train)
    assert [t.id for t in again.texts()] == [t.id for t in found["data.train"][2]]
