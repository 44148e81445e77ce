"""The policy and the rows that the benchmarks beside other programs share.

A Qwen2.5-VL of 26.5 million parameters with strong random weights, written as a Hugging Face folder
that both sides load, and drawn images with a question in a parquet file that both sides read.

    python -m benchmarks.small_policy FOLDER [--layers=8]     # writes the policy alone
"""

import argparse
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from transformers import PreTrainedTokenizerBase

from benchmarks.options import whole
from emor3_jax.data.labels import label_set
from emor3_jax.data.prompts import PromptTemplates
from emor3_jax.embedded.tokenizer import special_ids, train_tokenizer
from emor3_jax.models import LoadedPolicy, Policy, parse_config, save
from emor3_jax.models.params import Params, count_params
from emor3_jax.models.processor import ImageSettings, Processor

LABELS = "mikels8"
QUESTION = "Which emotion does this picture evoke?"
VOCABULARY = 4096


def tokenizer(seed: int = 0) -> PreTrainedTokenizerBase:
    """Returns a tokenizer of `VOCABULARY` ids that knows the words of the questions."""
    rng = np.random.default_rng(seed)
    syllables = [start + vowel for start in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
    words = ["".join(rng.choice(syllables, rng.integers(2, 4))) for _ in range(6000)]
    templates = PromptTemplates.load()
    texts = [templates.set, *templates.reflections.values(), QUESTION]
    texts += ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "yes", "no"]
    # Often enough that every word of a question becomes one token, as in a large vocabulary.
    corpus = [*texts, *label_set(LABELS), ", ".join(label_set(LABELS))] * 50
    return train_tokenizer([*corpus, " ".join(words)], VOCABULARY)


_CONFIG = {
    "model_type": "qwen2_5_vl",
    "vision_config": {
        "depth": 4,
        "hidden_size": 320,
        "intermediate_size": 896,
        "num_heads": 5,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": 384,
    },
    "vocab_size": VOCABULARY,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
"""Qwen2.5-VL's architecture at 26.5 million parameters."""


HALF_BILLION = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "vision_config": _CONFIG["vision_config"]
    | {
        "depth": 16,
        "hidden_size": 1280,
        "intermediate_size": 3456,
        "num_heads": 20,
        "fullatt_block_indexes": [7, 15],
        "out_hidden_size": 896,
    },
}
"""What makes the decoder that of Qwen2.5-0.5B, beside half of the 3B's tower."""


def make_policy(words: PreTrainedTokenizerBase, changes: Mapping[str, Any] | None = None) -> Policy:
    """Returns the policy for a tokenizer; `changes` replaces fields of its config."""
    return parse_config(_CONFIG | (changes or {}) | special_ids(words))


def strong_params(policy: Policy, seed: int = 0) -> Params:
    """Returns weights under which every layer and all of the context count.

    Weaker ones, or a louder embedding, whose rows are the head too, make greedy text repeat itself.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        noise = rng.standard_normal(leaf.shape, np.float32)
        if name == "scale":
            return 1 + np.float32(0.3) * noise
        if name == "bias":
            return np.float32(0.5) * noise
        if name == "embedding":
            return np.float32(0.15) * noise
        return np.float32(1.6) * noise / np.float32(leaf.shape[-2] ** 0.5)

    return jax.tree_util.tree_map_with_path(draw, policy.param_shapes())


def write_policy(folder: Path, seed: int = 0, changes: Mapping[str, Any] | None = None) -> int:
    """Writes the policy as a Hugging Face folder; returns its number of parameters."""
    words = tokenizer(seed)
    policy = make_policy(words, changes)
    params = strong_params(policy, seed)
    save(LoadedPolicy(policy, params, Processor(words, ImageSettings(), policy.layout)), folder)
    return count_params(params)


def image(side: int, rng: np.random.Generator) -> bytes:
    """Returns a PNG of smooth random colours."""
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.BICUBIC)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def write_rows(path: Path, side: int, count: int, seed: int = 0) -> None:
    """Writes rows with images of `side` x `side` pixels in the schema that training reads."""
    rng = np.random.default_rng(seed)
    labels = label_set(LABELS)
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [image(side, rng) for _ in range(count)]
    table = {
        "images": [[{"bytes": data, "path": None}] for data in images],
        "problem": [f"<image>{QUESTION}"] * count,
        "answer": [labels[i % len(labels)] for i in range(count)],
    }
    pq.write_table(pa.table(table), path)


def main() -> None:
    """Writes a policy, with as many layers in its decoder as asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=whole(1), default=_CONFIG["num_hidden_layers"])
    given = parser.parse_args()
    count = write_policy(given.folder, changes={"num_hidden_layers": given.layers})
    print(f"{given.folder}: {count:,} parameters")


if __name__ == "__main__":
    main()
