"""Policies: load and save a folder in Hugging Face's format, and a forward pass on its arrays."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.files import is_file, read_json
from emor3_jax.models import weights
from emor3_jax.models.errors import ProcessorError
from emor3_jax.models.families import FAMILIES
from emor3_jax.models.hub import find, is_hub_id, parse_config, published, read_config
from emor3_jax.models.layout import Encoded, ImageLayout
from emor3_jax.models.params import Params
from emor3_jax.models.policy import Policy
from emor3_jax.models.processor import Processor
from emor3_jax.models.tokenizer import PROCESSOR_FILE
from emor3_jax.parallel import hosts
from emor3_jax.types import Images, Prompt

__all__ = [
    "FAMILIES",
    "LoadedPolicy",
    "Policy",
    "check_folder",
    "find",
    "forward_logits",
    "is_hub_id",
    "load",
    "parse_config",
    "published",
    "read_config",
    "read_processor",
    "save",
]


@dataclasses.dataclass
class LoadedPolicy:
    """A policy with its parameters and what it needs to read text and images.

    Attributes:
      policy: family, sizes and arithmetic.
      params: nested dict of arrays, float32 unless asked for otherwise.
      processor: reads text and images, or None where only arrays go in.
      source: folder that it was read from, whose other files go along when it is saved.
    """

    policy: Policy
    params: Params = dataclasses.field(repr=False)
    processor: Processor | None = None
    source: Path | None = None

    @property
    def shapes(self) -> Any:
        """Sizes and special ids."""
        return self.policy.shapes

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        count = sum(leaf.size for leaf in leaves)
        kinds = ", ".join(sorted({leaf.dtype.name for leaf in leaves})) or "none"
        source = "" if self.source is None else f" from {str(self.source)!r}"
        family = self.policy.family.model_type
        return f"<LoadedPolicy {family}: {count:,} parameters ({kinds}){source}>"


def load(
    name: str | Path,
    *,
    dtype: Any = jnp.float32,
    matrix_dtype: Any = None,
    shardings: Callable[[Params], Any] | None = None,
) -> LoadedPolicy:
    """Reads a policy from a folder in Hugging Face's format, or from the hub.

    Args:
      name: a folder that holds `config.json`, weights as safetensors, tokenizer and preprocessor
        files; or the id of one on the hub, "owner/name" or "owner/name@revision", which is
        downloaded once.
      dtype: of the parameters; None keeps what is stored.
      matrix_dtype: of those that `params.is_matrix` recognises; None is `dtype`.
      shardings: from the tree of shapes to a tree of `NamedSharding`s; None puts the parameters on
        the first device.

    Raises:
      FileNotFoundError: if there is no such folder, or a file is missing.
      ShapesError: if `config.json` asks for something that is not implemented.
      WeightsError: if the tensors do not fit `config.json`.
    """
    folder = find(name)
    policy = read_config(folder)
    processor = read_processor(folder, policy)
    params = weights.read_params(
        folder, policy, dtype=dtype, matrix_dtype=matrix_dtype, shardings=shardings
    )
    return LoadedPolicy(policy, params, processor, folder)


def read_processor(folder: str | Path, policy: Policy) -> Processor:
    """Reads tokenizer and image settings of a policy's folder; raises ProcessorError."""
    return Processor.from_folder(folder, policy.layout)


def check_folder(folder: str | Path) -> Policy:
    """Checks that a policy's folder would load, without its weights: names, shapes, types, files.

    Args:
      folder: in Hugging Face's format.

    Returns:
      The policy that it holds.

    Raises:
      FileNotFoundError, ShapesError, WeightsError, ProcessorError: as `load`.
    """
    policy = read_config(folder)
    read_processor(folder, policy)
    weights.check(folder, policy)
    return policy


def save(
    policy: LoadedPolicy, folder: str | Path, *, max_file_bytes: int = weights.MAX_FILE_BYTES
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
    weights.write_params(policy.params, policy.policy, folder, max_file_bytes=max_file_bytes)
    if not hosts.is_first():
        return
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(policy.params)}
    stored = {"torch_dtype": kinds.pop() if len(kinds) == 1 else "float32"}
    data = policy.shapes.to_hf() | stored
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n")
    if policy.processor is not None:
        policy.processor.save(folder)
    if policy.source is not None:
        _keep_files(policy.source, folder)


_KEPT = ("*.json", "*.jinja", "*.txt", "LICENSE*", "LICENCE*", "NOTICE*")
_NOT_KEPT = ("config.json", PROCESSOR_FILE, "chat_template.json", weights.INDEX_FILE)
"""Written anew, or of weights that are not those of the folder."""
_VIDEO_FILE = "video_preprocessor_config.json"


def _keep_files(source: Path, folder: Path) -> None:
    """Copies what a policy's folder has besides: generation settings, templates, the licence."""
    for pattern in _KEPT:
        for file in source.glob(pattern):
            place = folder / file.name
            if is_file(file) and file.name not in _NOT_KEPT and not place.exists():
                shutil.copyfile(file, place)
    place = folder / _VIDEO_FILE
    if is_file(source / PROCESSOR_FILE) and not place.exists():
        # Where transformers 5 keeps the settings of videos; those of images are written anew.
        videos = read_json(source / PROCESSOR_FILE, ProcessorError, dict).get("video_processor")
        if videos is not None:
            place.write_text(json.dumps(videos, indent=2) + "\n")


def forward_logits(
    policy: LoadedPolicy,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    pixel_values: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the logits of every token, from arrays as transformers lays them out.

    Args:
      policy: as `load` returns it.
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
    prompt, images, _ = pack(policy.policy, input_ids, mask, pixel_values, image_grid_thw)
    dense = np.asarray(_prompt_logits(policy.policy, policy.params, prompt, images))
    out = np.zeros_like(dense)
    out[mask] = dense[prompt.mask]
    return out


def pack(
    policy: Policy,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    pixel_values: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
) -> tuple[Prompt, Images | None, np.ndarray]:
    """Returns transformers' arrays as the policy's own: right padded, images in windows.

    Args:
      policy: the policy.
      input_ids, attention_mask, pixel_values, image_grid_thw: as in `forward_logits`.

    Returns:
      The prompts, the images if there are any, and int32[B], the rope position after each prompt.

    Raises:
      ValueError: as `forward_logits`.
    """
    layout = policy.layout
    mask = np.asarray(attention_mask).astype(bool)
    input_ids = np.asarray(input_ids)
    grids = [tuple(map(int, grid)) for grid in (() if image_grid_thw is None else image_grid_thw)]
    encoded = _split_images(pixel_values, grids, layout)
    bucket = max((each.bucket for each in encoded), default=0)

    b, t = input_ids.shape
    prompt = Prompt(
        tokens=np.zeros((b, t), np.int32),
        positions=np.zeros((b, t, 3), np.int32),
        mask=np.arange(t) < mask.sum(axis=1)[:, None],
        image_slots=np.full((b, t), -1, np.int32),
    )
    following = np.zeros(b, np.int32)
    first = np.zeros(b + 1, np.int64)
    for row in range(b):
        tokens = input_ids[row, mask[row]]
        at = np.flatnonzero(tokens == policy.shapes.image_token_id)
        begin = end = first[row]
        while end < len(encoded) and sum(len(x.slots) for x in encoded[begin : end + 1]) <= len(at):
            end += 1
        first[row + 1] = end
        prompt.tokens[row, : len(tokens)] = tokens
        prompt.positions[row, : len(tokens)], following[row] = layout.positions(
            tokens, grids[begin:end]
        )
        if end > begin:
            slots = [i * layout.slots(bucket) + x.slots for i, x in enumerate(encoded[begin:end])]
            prompt.image_slots[row, at] = np.concatenate(slots)
    if first[-1] != len(grids):
        raise ValueError(
            f"{len(grids)} images are given, but there are image tokens for {first[-1]}"
        )
    if not encoded:
        return prompt, None, following
    stacked = layout.collate([x.image for x in encoded], bucket)
    # Rows with fewer images than others get empty ones.
    row = np.repeat(np.arange(b), np.diff(first))
    column = np.arange(len(encoded)) - first[row]

    def by_row(x: np.ndarray) -> np.ndarray:
        out = np.zeros((b, np.diff(first).max(), *x.shape[2:]), x.dtype)
        out[row, column] = x[:, 0]
        return out

    return prompt, jax.tree.map(by_row, stacked), following


def _split_images(
    pixel_values: np.ndarray | None, grids: Sequence[tuple[int, ...]], layout: ImageLayout
) -> list[Encoded]:
    patches = 0 if pixel_values is None else len(pixel_values)
    sizes = [int(np.prod(grid)) for grid in grids]
    if sum(sizes) != patches:
        raise ValueError(f"image_grid_thw counts {sum(sizes)} patches, pixel_values has {patches}")
    if not grids:
        return []
    pieces = np.split(np.asarray(pixel_values, np.float32), np.cumsum(sizes)[:-1])
    return [layout.arrange(piece, grid) for piece, grid in zip(pieces, grids, strict=True)]


@functools.partial(jax.jit, static_argnames="policy")
def _prompt_logits(
    policy: Policy, params: Params, prompt: Prompt, images: Images | None
) -> jax.Array:
    features = None if images is None else policy.encode_images(params, images)
    hidden, _ = policy.read_prompt(params, prompt, features)
    return policy.logits(params, hidden).astype(jnp.float32)
