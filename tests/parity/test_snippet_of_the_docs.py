"""The lines of the docs for transformers alone say what `infer` says, on strong random policies."""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from support import tiny  # noqa: E402
from support.tiny_run import small_policy  # noqa: E402

from emor3_jax.data.inference_settings import InferenceSettings  # noqa: E402
from emor3_jax.embedded.emoscenes import tasks  # noqa: E402
from emor3_jax.embedded.tokenizer import train_tokenizer  # noqa: E402
from emor3_jax.infer import InferenceOptions, answer  # noqa: E402
from emor3_jax.models import LoadedPolicy, load, save  # noqa: E402
from emor3_jax.models.processor import ImageSettings, Processor  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs/inference.md"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_it_has_the_response_of_infer(family, tmp_path, capsys):
    folder, photo = tmp_path / "policy", tmp_path / "photo.png"
    tokenizer = train_tokenizer(tasks.text_corpus(20), 800)
    policy = small_policy(tokenizer, family)
    images = ImageSettings(56**2, 112**2, patch_size=policy.shapes.vision.patch_size)
    params = jax.tree.map(np.asarray, tiny.strong_params(policy, seed=3))
    save(LoadedPolicy(policy, params, Processor(tokenizer, images, policy.layout)), folder)
    pixels = np.random.default_rng(0).integers(0, 255, (90, 130, 3), np.uint8)
    Image.fromarray(pixels).save(photo)
    (code,) = re.findall(r"```python\n(import inspect\n.*?)```", PAGE.read_text(), re.S)
    code = code.replace('"runs/demo/policy"', repr(str(folder))).replace(
        '"photo.jpg"', repr(str(photo))
    )
    code = code.replace("max_new_tokens=64", "max_new_tokens=12")
    exec(code, {})
    said = capsys.readouterr().out.rstrip("\n")
    InferenceSettings().changed(question="which emotion ?", template="tiny").write(folder)
    options = InferenceOptions(reflect=False, weigh_labels=False)
    found = answer(load(folder), photo, max_tokens=12, options=options)
    assert len(said) > 3 and found.response == said
