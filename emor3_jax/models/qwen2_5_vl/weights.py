"""Parameters from and to a folder in Hugging Face's format.

Both naming schemes are read (`visual.*`, `model.layers.*` as on the hub; `model.visual.*`,
`model.language_model.*` as some versions of transformers write); the hub's is written.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open

from emor3_jax.models.qwen2_5_vl.config import Config
from emor3_jax.models.qwen2_5_vl.model import Params, init_params

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LAYERS = {"visual/blocks": "visual.blocks", "model/layers": "model.layers"}


class WeightsError(ValueError):
    """Tensors of a checkpoint that do not fit its `config.json`."""


def param_shapes(config: Config) -> Params:
    """Returns the tree of parameters as `jax.ShapeDtypeStruct`s, without computing anything."""
    return jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))


def params_from_hf(folder: str | Path, config: Config) -> Params:
    """Reads the parameters of a checkpoint as float32 arrays on the host.

    Args:
      folder: holds `model.safetensors`, or an index of several files.
      config: of the same folder.

    Raises:
      FileNotFoundError: if there are no weights.
      WeightsError: if a tensor is missing, unknown, or of another shape.
    """
    with _Reader(Path(folder)) as reader:
        params: Params = {}
        for path, leaf in _leaves(param_shapes(config)):
            array = np.empty(leaf.shape, np.float32)
            for name, index in _tensors(path, leaf.shape):
                tensor = reader.get(name)
                expected = _hf_shape(path, leaf.shape, config)
                if tensor.shape != expected:
                    raise WeightsError(
                        f"tensor {name} has shape {list(tensor.shape)}, but config.json implies "
                        f"{list(expected)}; the weights and the config are probably of different "
                        f"sizes of the model ({folder})"
                    )
                array[index] = _from_hf(path, tensor)
            _put(params, path, array)
        reader.refuse_unread(config)
    logger.info("%s", parameter_overview(params))
    return params


def params_to_hf(params: Params, config: Config) -> dict[str, np.ndarray]:
    """Returns the float32 tensors of a checkpoint by their name on the hub.

    Args:
      params: the parameters; arrays on devices are fetched one at a time.
      config: their shapes.
    """
    tensors = {}
    for path, leaf in _leaves(params):
        array = np.asarray(leaf).astype(np.float32, copy=False)
        shape = _hf_shape(path, array.shape, config)
        for name, index in _tensors(path, array.shape):
            tensor = array[index].T if path.endswith("kernel") else array[index]
            tensors[name] = np.ascontiguousarray(tensor).reshape(shape)
    return tensors


def parameter_overview(params: Params) -> str:
    """Returns a table of all parameters: path, shape, how many numbers; the total last."""
    rows = [
        (path, "x".join(map(str, leaf.shape)), f"{int(np.prod(leaf.shape)):,}")
        for path, leaf in _leaves(params)
    ]
    total = sum(int(np.prod(leaf.shape)) for _, leaf in _leaves(params))
    rows.append(("total", "", f"{total:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"{path:<{widths[0]}}  {shape:<{widths[1]}}  {count:>{widths[2]}}"
        for path, shape, count in rows
    )


class _Reader:
    """The tensors of a folder under the hub's names, read one at a time."""

    def __init__(self, folder: Path):
        if (folder / INDEX_FILE).exists():
            index = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
            files = sorted(set(index.values()))
        elif (folder / WEIGHTS_FILE).exists():
            files = [WEIGHTS_FILE]
        else:
            raise FileNotFoundError(
                f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; give a folder in Hugging "
                "Face's format with weights as safetensors"
            )
        self._folder = folder
        # The flax reader is the one that knows bfloat16 without torch.
        self._files = [safe_open(folder / file, framework="flax") for file in files]
        self._where = {
            _hub_name(key): (file, key)
            for file in self._files
            for key in file.keys()  # noqa: SIM118
        }
        self._unread = set(self._where)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: Any) -> None:
        self._files.clear()
        self._where.clear()

    def get(self, name: str) -> np.ndarray:
        if name not in self._where:
            cause = (
                "config.json says that the head is not tied (tie_word_embeddings)"
                if name == "lm_head.weight"
                else "the download is incomplete or config.json is of a larger model"
            )
            raise WeightsError(f"{self._folder} has no tensor {name}; probably {cause}")
        self._unread.discard(name)
        file, key = self._where[name]
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return np.asarray(file.get_tensor(key)).astype(np.float32)

    def refuse_unread(self, config: Config) -> None:
        unread = {name for name in self._unread if not name.endswith("inv_freq")}
        if config.tie_word_embeddings:
            unread.discard("lm_head.weight")
        if unread:
            raise WeightsError(
                f"{self._folder} has {len(unread)} tensors that config.json has no place for, "
                f"{min(unread)} among them; probably config.json is of a smaller model"
            )


def _hub_name(key: str) -> str:
    key = key.replace("model.language_model.", "model.", 1)
    return key.removeprefix("model.") if key.startswith("model.visual.") else key


def _leaves(tree: Params) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield "/".join(key.key for key in path), leaf


def _put(tree: Params, path: str, value: np.ndarray) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def _tensors(path: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Yields the hub's name of each tensor that a parameter holds, and its index there."""
    base, kind = path.rsplit("/", 1)
    suffix = "bias" if kind == "bias" else "weight"
    for stack, name in _LAYERS.items():
        if base.startswith(stack + "/"):
            inner = base.removeprefix(stack + "/").replace("/", ".")
            for layer in range(shape[0]):
                yield f"{name}.{layer}.{inner}.{suffix}", layer
            return
    name = base.replace("/", ".").replace("mlp_", "mlp.")
    yield name.replace("patch_embed", "patch_embed.proj") + f".{suffix}", ...


def _hf_shape(path: str, shape: tuple[int, ...], config: Config) -> tuple[int, ...]:
    """Returns the shape on disk of one of the tensors of a parameter."""
    if any(path.startswith(stack + "/") for stack in _LAYERS):
        shape = shape[1:]
    if path == "visual/patch_embed/kernel":
        v = config.vision
        return (shape[1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    return shape[::-1] if path.endswith("kernel") else shape


def _from_hf(path: str, tensor: np.ndarray) -> np.ndarray:
    return tensor.reshape(tensor.shape[0], -1).T if path.endswith("kernel") else tensor
