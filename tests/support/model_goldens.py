"""Writes the golden policies that `tests/models` compares with: made by torch and transformers.

Usage: python tests/support/model_goldens.py [folder]

Each golden is a folder as transformers 5 writes it (weights in bfloat16, `config.json` nested) and
a `golden.npz` of inputs, logits and greedy continuations, computed in float32. The weights are
strong (logits of standard deviation about 4, biases, norms away from 1): default initialisation
would hide errors.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
IMAGE, VISION_START, VISION_END, PAD = 70, 72, 73, 76
GRIDS = [(1, 4, 6), (1, 8, 8), (1, 6, 4)]
"""Images of the batch: one window and a half, four whole windows, ragged in both directions."""
IMAGES_OF_ROW = [[0], [1, 2], []]
NEW_TOKENS = 12


MODELS = {
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
"""Family → transformers' classes of its config and its model."""

_TEXT = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "bos_token_id": 74,
    "eos_token_id": 75,
    "pad_token_id": PAD,
}
_VISION = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
}
_PARTS = {
    "qwen2_5_vl": (
        {"num_hidden_layers": 2},
        {"rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        {"window_size": 16, "fullatt_block_indexes": [1]},
    ),
    # Heads wider than the hidden size holds; features of two layers, one of them the last, for
    # three layers of the decoder; a table between the sizes of the images.
    "qwen3_vl": (
        {"num_hidden_layers": 3, "head_dim": 16},
        {"rope_theta": 5000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]},
    ),
}
"""Family → what its decoder, its rope and its tower have besides."""


def hf_config(family: str, tied: bool) -> PreTrainedConfig:
    """Returns a tiny config, built by transformers alone."""
    text, rope, vision = _PARTS[family]
    return MODELS[family][0](
        text_config=_TEXT | text | {"rope_parameters": {"rope_type": "default", **rope}},
        vision_config=_VISION | vision,
        image_token_id=IMAGE,
        video_token_id=71,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )


def strong_model(family: str, tied: bool, seed: int = 0) -> PreTrainedModel:
    """Returns a float32 model with strong random weights that bfloat16 holds exactly."""
    model = MODELS[family][1](hf_config(family, tied)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                noise = 1 + 0.3 * noise
            elif name.endswith("bias"):
                noise = 0.5 * noise
            elif "embed_tokens" in name or "lm_head" in name:
                noise = 0.7 * noise
            else:
                # Layers louder than the embeddings they add to: else a tied head repeats itself.
                noise = 1.6 * noise / parameter[0].numel() ** 0.5
            parameter.copy_(noise.bfloat16())
    return model


def make_batch(seed: int, side: str) -> dict[str, np.ndarray]:
    """Returns a batch as a processor lays it out: rows with one image, two and none.

    Args:
      seed: of tokens and pixels.
      side: "left" or "right", where padding goes.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for images in IMAGES_OF_ROW:
        row = list(rng.integers(0, 70, 3))
        for image in images:
            _, height, width = GRIDS[image]
            row += [VISION_START, *[IMAGE] * (height * width // 4), VISION_END]
            row += list(rng.integers(0, 70, 4))
        rows.append(row)
    length = max(map(len, rows))
    ids = np.full((len(rows), length), PAD)
    mask = np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        at = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[i, at] = row
        mask[i, at] = 1
    patches = sum(height * width for _, height, width in GRIDS)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        # Coarse numbers compress well and are exact in every type.
        "pixel_values": (rng.integers(-64, 65, (patches, 96)) / 32).astype(np.float32),
        "image_grid_thw": np.array(GRIDS),
    }


def torch_inputs(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Returns the batch for transformers, with the token types without which it drops mrope."""
    inputs = {name: torch.tensor(value) for name, value in batch.items()}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return inputs


def greedy(model: PreTrainedModel, inputs: dict[str, torch.Tensor], count: int) -> np.ndarray:
    """Returns the greedy continuation of left-padded rows, each token from a full forward pass."""
    with torch.no_grad():
        for _ in range(count):
            # Special ids are never generated: an image token would ask for an image.
            token = model(**inputs).logits[:, -1, :IMAGE].argmax(-1)[:, None]
            for name, column in (
                ("input_ids", token),
                ("attention_mask", torch.ones_like(token)),
                ("mm_token_type_ids", torch.zeros_like(token)),
            ):
                column = column.to(inputs[name].dtype)
                inputs = {**inputs, name: torch.cat([inputs[name], column], dim=1)}
    return inputs["input_ids"][:, -count:].numpy()


def write(folder: Path) -> None:
    """Writes the goldens of all families under a folder."""
    for family in MODELS:
        for name, tied in (("tied", True), ("untied", False)):
            _write_one(strong_model(family, tied), folder / family / name)


def _write_one(model: PreTrainedModel, folder: Path) -> None:
    golden = {}
    for side in ("left", "right"):
        batch = make_batch(1, side)
        with torch.no_grad():
            logits = model(**torch_inputs(batch)).logits
        golden[f"{side}_logits"] = logits[torch.tensor(batch["attention_mask"]).bool()].numpy()
        golden[f"{side}_input_ids"] = batch["input_ids"].astype(np.int32)
        golden[f"{side}_attention_mask"] = batch["attention_mask"].astype(np.int32)
    golden["pixel_values"] = batch["pixel_values"].astype(np.float16)
    golden["image_grid_thw"] = batch["image_grid_thw"].astype(np.int32)
    golden["continuation"] = greedy(model, torch_inputs(make_batch(1, "left")), NEW_TOKENS)
    model.bfloat16().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "golden.npz", **golden)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN)
