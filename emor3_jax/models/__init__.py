"""Policies: load and save a folder in Hugging Face's format, and a forward pass on its arrays."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.models.qwen2_5_vl import layout, model, rope, weights
from emor3_jax.models.qwen2_5_vl.config import Config, ShapesError
from emor3_jax.models.qwen2_5_vl.inputs import Images, Prompt
from emor3_jax.parallel import hosts

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
"""What of a repository on the hub is downloaded: no weights in other formats."""


@dataclasses.dataclass
class Policy:
    """A policy with what it needs to read text and images.

    Attributes:
      config: shapes and ids.
      params: nested dict of arrays, float32 unless asked for otherwise.
      processor: `emor3_jax.models.qwen2_5_vl.processor.Processor`, or None where only arrays go in.
    """

    config: Config
    params: model.Params
    processor: Any = None


def load(
    name: str | Path,
    *,
    dtype: Any = jnp.float32,
    shardings: Callable[[model.Params], Any] | None = None,
) -> Policy:
    """Reads a policy from a folder in Hugging Face's format, or from the hub.

    Args:
      name: a folder that holds `config.json`, weights as safetensors, tokenizer and preprocessor
        files; or the id of one on the hub, "owner/name" or "owner/name@revision", which is
        downloaded once.
      dtype: of the parameters; None keeps what is stored.
      shardings: from the tree of shapes to a tree of `NamedSharding`s; None puts the parameters on
        the first device.

    Raises:
      FileNotFoundError: if there is no such folder, or a file is missing.
      ShapesError: if `config.json` asks for something that is not implemented.
      WeightsError: if the tensors do not fit `config.json`.
    """
    from emor3_jax.models.qwen2_5_vl.processor import Processor

    folder = find(name)
    config = read_config(folder)
    processor = Processor.from_folder(folder)
    params = weights.read_params(folder, config, dtype=dtype, shardings=shardings)
    return Policy(config, params, processor)


def find(name: str | Path) -> Path:
    """Returns the folder of a policy, downloading it first if the name is one of the hub's.

    Args:
      name: as `load` takes it. A folder of that name wins over the hub.

    Raises:
      FileNotFoundError: if it is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    match = _HUB_ID.fullmatch(str(name))
    if match is None:
        raise FileNotFoundError(f"there is no folder {name}, and an id on the hub is 'owner/name'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, revision = match.groups()
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and the hub gave no policy of that name: {error}"
        ) from error


def is_hub_id(name: str) -> bool:
    """Returns whether a name has the form of an id on the hub."""
    return _HUB_ID.fullmatch(name) is not None


def read_config(folder: str | Path) -> Config:
    """Reads the `config.json` of a folder; raises as `load`."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder in Hugging Face's format")
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ShapesError(f"{path} is not JSON: {error}") from error
    return Config.from_hf(data)


def save(
    policy: Policy, folder: str | Path, *, max_file_bytes: int = weights.MAX_FILE_BYTES
) -> None:
    """Writes a policy as a folder in Hugging Face's format, which transformers loads as it is.

    Args:
      policy: the policy; weights are written in the types that they have. All processes must call
        this, the first one writes.
      folder: made if missing; files of the same names, and other weights, are replaced.
      max_file_bytes: more weights than this are cut into several files, with an index.
    """
    folder = Path(folder)
    if hosts.is_first():
        folder.mkdir(parents=True, exist_ok=True)
    weights.write_params(policy.params, policy.config, folder, max_file_bytes=max_file_bytes)
    if not hosts.is_first():
        return
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(policy.params)}
    stored = {"torch_dtype": kinds.pop() if len(kinds) == 1 else "float32"}
    data = policy.config.to_hf() | stored
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n")
    if policy.processor is not None:
        policy.processor.save(folder)


def forward_logits(
    policy: Policy,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    pixel_values: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the logits of every token, from arrays as transformers lays them out.

    Args:
      policy: the policy.
      input_ids: int[B, T], padded on either side.
      attention_mask: int or bool[B, T].
      pixel_values: float[patches of all images, C].
      image_grid_thw: int[images, 3], images in the order of their tokens, row after row.

    Returns:
      float32[B, T, V]; 0 at padding.

    Raises:
      ValueError: if image tokens, grids and patches do not fit each other.
    """
    mask = np.asarray(attention_mask).astype(bool)
    prompt, images, _ = pack(policy.config, input_ids, mask, pixel_values, image_grid_thw)
    dense = np.asarray(_prompt_logits(policy.config, policy.params, prompt, images))
    out = np.zeros_like(dense)
    out[mask] = dense[prompt.mask]
    return out


def pack(
    config: Config,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    pixel_values: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
) -> tuple[Prompt, Images | None, np.ndarray]:
    """Returns transformers' arrays as the policy's own: right padded, images in windows.

    Args:
      config: the policy's shapes.
      input_ids, attention_mask, pixel_values, image_grid_thw: as in `forward_logits`.

    Returns:
      The prompts, the images if there are any, and int32[B], the rope position after each prompt.

    Raises:
      ValueError: as `forward_logits`.
    """
    mask = np.asarray(attention_mask).astype(bool)
    input_ids = np.asarray(input_ids)
    grids = [tuple(map(int, grid)) for grid in (() if image_grid_thw is None else image_grid_thw)]
    layouts = _cut_images(pixel_values, grids, config)
    windows = max((len(x.mask) for x in layouts), default=0)
    slots_per_image = windows * config.vision.window_patches // config.vision.merge_unit
    slots = [i * slots_per_image + x.slot_of_token for i, x in enumerate(layouts)]

    b, t = input_ids.shape
    prompt = Prompt(
        tokens=np.zeros((b, t), np.int32),
        positions=np.zeros((b, t, 3), np.int32),
        mask=np.arange(t) < mask.sum(axis=1)[:, None],
        image_slots=np.full((b, t), -1, np.int32),
    )
    following = np.zeros(b, np.int32)
    taken = 0
    for row in range(b):
        tokens = input_ids[row, mask[row]]
        n = len(tokens)
        at = np.flatnonzero(tokens == config.image_token_id)
        first = taken
        while taken < len(slots) and sum(map(len, slots[first : taken + 1])) <= len(at):
            taken += 1
        prompt.tokens[row, :n] = tokens
        prompt.positions[row, :n], following[row] = rope.prompt_positions(
            tokens, grids[first:taken], config
        )
        if taken > first:
            prompt.image_slots[row, at] = np.concatenate(slots[first:taken])
    if taken != len(grids):
        raise ValueError(f"{len(grids)} images are given, but there are image tokens for {taken}")
    return prompt, layout.pad_images(layouts, windows) if layouts else None, following


def _cut_images(
    pixel_values: np.ndarray | None, grids: Sequence[tuple[int, ...]], config: Config
) -> list[layout.WindowLayout]:
    patches = 0 if pixel_values is None else len(pixel_values)
    sizes = [int(np.prod(grid)) for grid in grids]
    if sum(sizes) != patches:
        raise ValueError(f"image_grid_thw counts {sum(sizes)} patches, pixel_values has {patches}")
    if not grids:
        return []
    pieces = np.split(np.asarray(pixel_values, np.float32), np.cumsum(sizes)[:-1])
    return [
        layout.window_layout(piece, grid, config.vision)
        for piece, grid in zip(pieces, grids, strict=True)
    ]


@functools.partial(jax.jit, static_argnames="config")
def _prompt_logits(
    config: Config, params: model.Params, prompt: Prompt, images: Images | None
) -> jax.Array:
    features = None if images is None else model.encode_images(config, params, images)
    hidden, _ = model.forward_prompt(config, params, prompt, features)
    return model.logits(config, params, hidden).astype(jnp.float32)
