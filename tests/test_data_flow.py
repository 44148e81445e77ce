"""From a folder on disk to a trained policy: build, inspect, two training steps, evaluate."""

import json
import os
import shutil
from pathlib import Path

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from support import layouts
from support.tiny_run import small_policy

from configs import cpu_demo
from emor3_jax import evaluate, inspect
from emor3_jax.config import dataset
from emor3_jax.data.labels import LABEL_SETS
from emor3_jax.embedded.emoscenes import tasks
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models import LoadedPolicy, save
from emor3_jax.models.processor import ImageSettings, Processor
from emor3_jax.train import train

ROWS = {"train": 240, "val": 20, "test": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random policy of a hundred thousand parameters, and EmoSet's layout with 300 JPEG files."""
    folder = tmp_path_factory.mktemp("flow")
    tokenizer = train_tokenizer(tasks.text_corpus(20), 800)
    policy = small_policy(tokenizer)
    params = jax.device_get(policy.init(jax.random.key(0)))
    images = ImageSettings(min_pixels=56**2, max_pixels=112**2)
    save(
        LoadedPolicy(policy, params, Processor(tokenizer, images, policy.layout)), folder / "policy"
    )
    layouts.emoset(folder / "EmoSet", ROWS)
    return folder


def make_config(folder: Path, train_set: ConfigDict, **sets: ConfigDict) -> ConfigDict:
    config = cpu_demo.get_config()
    config.policy.path = str(folder / "policy")
    config.data.folder = str(folder / "data")
    config.data.prompt_lengths = (160,)
    config.data.train = train_set
    config.evaluate.sets = ConfigDict(sets)
    config.evaluate.prompts, config.evaluate.every = 20, 2
    config.steps = 2
    config.rollout.prompts, config.rollout.responses, config.rollout.max_tokens = 8, 2, 8
    config.policy_update.prompts, config.policy_update.micro_prompts = 8, 4
    config.policy_update.response_lengths = config.reflect.text_lengths = (8,)
    config.reward.table_cache = str(folder / "tables")
    config.log.compile_cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    return config


def run(config: ConfigDict, folder: Path) -> tuple[dict, list[dict], dict]:
    """Returns what inspect found, the metrics of training and those of evaluation."""
    found = inspect.main(config, folder / "inspect", samples=3)
    train(config, folder / "run")
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    config.policy.path = str(folder / "run" / "policy")
    return found, metrics, evaluate.main(config, folder / "evaluation")


def test_emoset_from_its_folder_to_an_evaluated_policy(folder, tmp_path, capsys):
    root = folder / "EmoSet"
    # Images of the training split again in the test split, and one that is damaged.
    leaked = {f"fear_{i:05d}": f"fear_{i + 260:05d}" for i in (6, 14, 22)}
    for a, b in leaked.items():
        shutil.copy(root / f"image/fear/{a}.jpg", root / f"image/fear/{b}.jpg")
    (root / "image/awe/awe_00001.jpg").write_bytes(b"no image")
    one_line = dataset(kind="emoset", path=str(root), split="train")
    config = make_config(
        folder, one_line, emoset=dataset(kind="emoset", path=str(root), split="test")
    )
    config.data.train.subset = 160
    found, metrics, results = run(config, folder)

    trained = found["sets"]["train"]
    assert trained["rows"] == 160 and set(trained["labels"]) == set(LABEL_SETS["mikels8"])
    assert set(trained["labels"].values()) <= {19, 20}
    # 32 x 24 pixels become 84 x 56, so 6 tokens.
    assert trained["image_tokens"] == [(6, 6, trained["usable"])]
    page = (folder / "inspect" / "inspect.html").read_text()
    assert page.count('class="sample"') == 6
    asked = "Which emotion would someone who looks at this picture most likely feel?"
    assert asked in page and "&lt;|image_pad|&gt;<i> x 6</i>" in page
    assert "emoset: 40 rows, 40 usable" in capsys.readouterr().out

    assert [row["step"] for row in metrics] == [0, 1, 2]
    ids = (folder / "run" / "subsets" / "train.txt").read_text().split()
    assert len(ids) == 160
    drawn = sorted(leaked.keys() & set(ids))
    assert drawn
    assert found["shared"] == {"train, emoset": [(a, leaked[a]) for a in drawn]}
    assert results["emoset"].metrics["rows"] == 40
    assert (folder / "evaluation" / "report.html").is_file()


def test_the_releases_parquet_goes_the_same_way(folder, tmp_path):
    rows = json.loads((folder / "EmoSet" / "test.json").read_text())
    table = pa.Table.from_pylist(
        [
            {
                "images": [{"bytes": (folder / "EmoSet" / image).read_bytes(), "path": None}],
                "problem": "<image>which emotion ?",
                "answer": label,
            }
            for label, _, image, _ in rows
        ]
    )
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "policy").symlink_to(folder / "policy")
    parquet = dataset(kind="parquet", path=str(tmp_path / "a.parquet"))
    config = make_config(tmp_path, parquet, test=parquet.copy_and_resolve_references())
    found, metrics, results = run(config, tmp_path)
    assert found["sets"]["train"]["usable"] == 40
    # The same file twice: every image is shared.
    assert len(found["shared"]["train, test"]) == 40
    assert len(metrics) == 3 and results["test"].metrics["rows"] == 40
