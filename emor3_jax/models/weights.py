"""Parameters from and to a folder in Hugging Face's format, one tensor at a time.

Neither direction holds a second copy of the policy: a tensor is read straight into its part of the
(sharded) array of its parameter, each device reading only its own part; and the files are
written one after the other. What exists besides the parameters is one tensor when reading, one
file when writing.

Deviations, numbered:
 1. Files are opened anew for each tensor: a mapped file counts as memory of the process as long as
    it is open, and a whole policy would be there twice.
"""

import functools
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors import safe_open
from safetensors.numpy import save_file

from emor3_jax.files import head_of, is_file, open_regular, read_json
from emor3_jax.models.errors import WeightsError
from emor3_jax.models.naming import HubTensor, by_head, by_part, is_kernel
from emor3_jax.models.params import Params, is_matrix, leaves, parameter_overview
from emor3_jax.models.policy import Policy
from emor3_jax.parallel import hosts

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_WEIGHTS_BYTES = 2**40
MAX_FILE_BYTES = 5 * 10**9
"""Size at which the hub starts another file."""

_HEAD = "lm_head.weight"
_OF_QUANTISED = (
    *(".qweight", ".qzeros", ".scales", ".weight_packed", ".weight_scale", ".weight_scale_inv"),
    *(".weight_scale_2", ".input_scale", ".absmax", ".quant_map", ".g_idx", ".SCB"),
)
"""Ends of names that tensors of AWQ, GPTQ, MLX, compressed-tensors, FP8, NVFP4 and bitsandbytes
have."""
_ROWS = 4096
"""Rows of two matrices that are compared at once."""

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def read_params(
    folder: str | Path,
    policy: Policy,
    *,
    dtype: Any = jnp.float32,
    matrix_dtype: Any = None,
    shardings: Callable[[Params], Any] | None = None,
) -> Params:
    """Reads the parameters of a checkpoint straight into device arrays.

    Args:
      folder: holds `model.safetensors`, or several files and their index.
      policy: of the same folder.
      dtype: of the arrays; None keeps what is stored.
      matrix_dtype: of those that `params.is_matrix` recognises; None is `dtype`.
      shardings: from the tree of shapes to a tree of `NamedSharding`s, none of which cuts the
        axis of layers; None puts everything on the first device.

    Returns:
      Nested dict of arrays.

    Raises:
      FileNotFoundError: if there are no weights.
      WeightsError: if a tensor is missing, unknown, of another shape, quantised, or not finite.
    """
    reader = _Reader(Path(folder), policy)
    shapes = policy.param_shapes()
    reader.check(shapes)
    device = SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda _: device, shapes) if shardings is None else shardings(shapes)
    params: Params = {}
    for (path, leaf), sharding in zip(leaves(shapes), jax.tree.leaves(placed), strict=True):
        tensors = list(policy.family.hub_tensors(path, leaf.shape, policy.shapes))
        chosen = matrix_dtype if is_matrix(path.rpartition("/")[2]) else None
        kind = jnp.dtype(chosen or dtype or reader.dtype(tensors))
        value = _read_param(reader, path, leaf.shape, tensors, kind, sharding)
        _put(params, path, value)
    _check_finite(params, policy, folder)
    logger.info("%s", parameter_overview(params))
    return params


def check(folder: str | Path, policy: Policy) -> None:
    """Checks names, shapes and types of a folder's tensors by their files' headers.

    Args:
      folder, policy: as of `read_params`, which says what is raised.
    """
    _Reader(Path(folder), policy).check(policy.param_shapes())


def write_params(
    params: Params, policy: Policy, folder: Path, *, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Writes the parameters in their own types under the hub's names.

    Args:
      params: the parameters; fetched from devices one tensor at a time, by all processes, of which
        the first one writes.
      policy: that they belong to.
      folder: exists; weights that were there before are replaced.
      max_file_bytes: more than this is cut into several files, with an index.
    """
    where = {
        tensor.name: (path, leaf, tensor)
        for path, leaf in leaves(params)
        for tensor in policy.family.hub_tensors(path, leaf.shape, policy.shapes)
    }

    def size(entry: tuple[str, Any, HubTensor]) -> int:
        return int(np.prod(entry[2].shape)) * entry[1].dtype.itemsize

    split = split_state_dict_into_shards_factory(
        where,
        get_storage_size=size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensor = fetch(*where[name])
            if hosts.is_first():
                tensors[name] = tensor
        if hosts.is_first():
            # The library lets nobody but the owner read what it writes.
            (folder / file).unlink(missing_ok=True)
            (folder / file).touch()
            mode = (folder / file).stat().st_mode
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(mode)
    if not hosts.is_first():
        return
    for old in folder.glob("model*.safetensors"):
        if old.name not in split.filename_to_tensors:
            old.unlink()
    (folder / INDEX_FILE).unlink(missing_ok=True)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def fetch(path: str, leaf: Any, tensor: HubTensor) -> np.ndarray:
    """Returns one tensor on the host as the hub lays it out, in the parameter's type.

    Args:
      path, leaf: the parameter.
      tensor: which of its tensors.
    """
    array = np.asarray(hosts.fetch(leaf if tensor.layer is None else leaf[tensor.layer]))
    if is_kernel(path):
        # NumPy turns foreign types element by element; as plain integers it is quick.
        plain = array.view(np.uint16) if array.itemsize == 2 else array
        array = np.ascontiguousarray(plain.T).view(array.dtype)
    array = by_part(array, tensor.heads) if tensor.heads else array
    return np.ascontiguousarray(array).reshape(tensor.shape)


class _Entry(NamedTuple):
    """A tensor on disk: its file, its name there, its shape and type."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


class _Reader:
    """The tensors of a folder under the hub's names."""

    def __init__(self, folder: Path, policy: Policy) -> None:
        self._policy = policy
        if is_file(folder / WEIGHTS_FILE):
            # As transformers does where an index lies beside it.
            files = [WEIGHTS_FILE]
            if (folder / INDEX_FILE).exists():
                logger.warning(
                    "%s has %s and %s; the first is read", folder, WEIGHTS_FILE, INDEX_FILE
                )
        elif (folder / INDEX_FILE).exists():
            files = _shards(folder / INDEX_FILE)
        else:
            raise FileNotFoundError(
                f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}{_pickles(folder)}; give a "
                "folder in Hugging Face's format with weights as safetensors"
            )
        self._folder = folder
        self._entries: dict[str, _Entry] = {}
        for name in files:
            if not (folder / name).exists():
                raise FileNotFoundError(
                    f"{folder / name} does not exist, but {INDEX_FILE} names it; the download is "
                    "incomplete"
                )
            os.close(open_regular(folder / name, _MAX_WEIGHTS_BYTES, WeightsError))
            try:
                with safe_open(folder / name, framework="numpy") as file:
                    for key in file.keys():  # noqa: SIM118
                        part = file.get_slice(key)
                        shape = tuple(part.get_shape())
                        self._add(_Entry(folder / name, key, shape, part.get_dtype()))
            except WeightsError:
                raise
            except Exception as error:
                # The header says where each tensor lies; the library checks it against the size of
                # the file before anything is read.
                what = head_of(folder / name) or f"is not a whole safetensors file ({error})"
                raise WeightsError(f"{folder / name} {what}; download it again") from error

    def _add(self, entry: _Entry) -> None:
        name = self._policy.family.hub_name(entry.key)
        if (other := self._entries.get(name)) is not None:
            raise WeightsError(
                f"{self._folder} has two tensors for {name}: {other.key} in {other.file.name} and "
                f"{entry.key} in {entry.file.name}; remove the files that are not of this policy"
            )
        self._entries[name] = entry

    def _keys(self, names: set[str]) -> list[str]:
        """Returns the names that tensors have on disk."""
        return [self._entries[name].key for name in names]

    def check(self, shapes: Params) -> None:
        """Compares all names, shapes and types with those of the policy, before any is read."""
        policy = self._policy
        unused = {name for name in self._entries if not name.endswith("inv_freq")}
        quantised = min((name for name in unused if name.endswith(_OF_QUANTISED)), default=None)
        if quantised is not None:
            raise WeightsError(
                f"{self._folder} has a tensor {quantised}: quantised weights cannot be trained; "
                "give the policy that they were made from, in bfloat16"
            )
        wanted = {
            tensor.name: tensor
            for path, leaf in leaves(shapes)
            for tensor in policy.family.hub_tensors(path, leaf.shape, policy.shapes)
        }
        for tensor in wanted.values():
            if tensor.name not in self._entries:
                raise WeightsError(
                    f"{self._folder} has no tensor {tensor.name}; probably "
                    f"{_cause(tensor.name, self._keys(unused - wanted.keys()))}"
                )
            unused.discard(tensor.name)
            entry = self._entries[tensor.name]
            if entry.shape != tensor.shape:
                raise WeightsError(
                    f"tensor {tensor.name} has shape {list(entry.shape)}, but config.json "
                    f"implies {list(tensor.shape)}; the weights and the config are probably of "
                    f"different sizes of the model ({self._folder})"
                )
            if entry.dtype not in _DTYPES:
                raise WeightsError(
                    f"tensor {tensor.name} is stored as {entry.dtype}; only "
                    f"{', '.join(_DTYPES)} can be read: give weights that are not quantised "
                    f"({self._folder})"
                )
        if policy.shapes.tie_word_embeddings:
            unused.discard(_HEAD)
            path = "model/embed_tokens/embedding"
            (table,) = policy.family.hub_tensors(
                path, dict(leaves(shapes))[path].shape, policy.shapes
            )
            self._check_tied(self._entries[table.name])
        if unused:
            raise WeightsError(
                f"{self._folder} has {len(unused)} tensors that config.json has no place for, "
                f"{min(self._keys(unused))} among them; probably config.json is of a smaller model"
            )

    def _check_tied(self, embedding: _Entry) -> None:
        """Refuses a head of its own where `config.json` says that it is the embedding."""
        head = self._entries.get(_HEAD)
        if head is None:
            return
        with (
            safe_open(head.file, framework="numpy") as first,
            safe_open(embedding.file, framework="numpy") as second,
        ):
            pieces = first.get_slice(head.key), second.get_slice(embedding.key)
            count = embedding.shape[0]
            rows = (slice(row, min(row + _ROWS, count)) for row in range(0, count, _ROWS))
            if head.shape == embedding.shape and all(
                np.array_equal(*(piece[part] for piece in pieces)) for part in rows
            ):
                return
        raise WeightsError(
            f"{self._folder}: {_HEAD} differs from the embedding, but config.json says that they "
            "are one (tie_word_embeddings); set that to false"
        )

    def dtype(self, tensors: list[HubTensor]) -> Any:
        """Returns the narrowest type that holds what all these tensors are stored as."""
        kinds = {jnp.dtype(_DTYPES[self._entries[tensor.name].dtype]) for tensor in tensors}
        widest = functools.reduce(jnp.promote_types, kinds)
        # Arrays on devices have at most 32 bits.
        return jnp.dtype(jnp.float32) if widest == np.float64 else widest

    def read(self, tensor: HubTensor, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part of a tensor, seen as a matrix if it has more axes than two."""
        entry = self._entries[tensor.name]
        with safe_open(entry.file, framework="numpy") as file:
            if len(entry.shape) > 2:
                part = file.get_tensor(entry.key).reshape(entry.shape[0], -1)[index]
            elif tensor.heads:
                part = by_head(file.get_tensor(entry.key), tensor.heads)[index]
            else:
                part = file.get_slice(entry.key)[index]
        return part.astype(np.float32) if part.dtype == np.float64 else part


def _cause(name: str, strangers: Sequence[str]) -> str:
    """Returns why a tensor may be missing, as far as the tensors without a place tell."""
    if name == _HEAD:
        return "config.json says that the head is not tied (tie_word_embeddings)"
    if strangers:
        return (
            f"config.json is of another model, or the names are of another program: it has no "
            f"place for {len(strangers)} others, {min(strangers)} among them; give a folder as on "
            "the hub"
        )
    return "the download is incomplete or config.json is of a larger model"


def _shards(index: Path) -> list[str]:
    """Returns the files that an index names, which must lie beside it."""
    found = read_json(index, WeightsError, dict).get("weight_map")
    names = found.values() if isinstance(found, dict) else [None]
    for name in names:
        if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors"):
            raise WeightsError(
                f"{index} is damaged: its weight_map must name safetensors files beside it, not "
                f"{str(name)[:80]!r}; download it again"
            )
    return sorted(set(names))


_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def _pickles(folder: Path) -> str:
    """Returns the part of a message that names weights stored as pickles; "" if there are none."""
    there = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if not there:
        return ""
    return (
        f", only {there[0]}, a pickle, which can run code and is never read (convert it with "
        "transformers' save_pretrained)"
    )


def _read_param(
    reader: _Reader,
    path: str,
    shape: tuple[int, ...],
    tensors: list[HubTensor],
    dtype: Any,
    sharding: Sharding,
) -> jax.Array:
    """Reads one parameter: each device its own part of each tensor, turned on the device."""
    transpose, stacked = is_kernel(path), tensors[0].layer is not None
    layer_shape, layer_sharding = shape[stacked:], sharding
    if isinstance(sharding, NamedSharding):
        spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))[stacked:]
        layer_sharding = NamedSharding(
            sharding.mesh, PartitionSpec(*(spec[::-1] if transpose else spec))
        )

    def load(tensor: HubTensor) -> jax.Array:
        return jax.make_array_from_callback(
            layer_shape[::-1] if transpose else layer_shape,
            layer_sharding,
            functools.partial(reader.read, tensor),
        )

    if not stacked:
        return _convert(transpose, dtype, sharding)(load(tensors[0]))
    array = _zeros(shape, dtype, sharding)()
    for tensor in tensors:
        array = _layer_writer(transpose, sharding)(array, load(tensor), tensor.layer)
    return array


def _check_finite(params: Params, policy: Policy, folder: str | Path) -> None:
    """Raises WeightsError, naming the first tensor on the hub that is not finite."""
    found = list(leaves(params))
    # One program for all: one for each would compile as long as a small policy is read.
    finite = hosts.fetch(_are_finite([x for _, x in found]))
    for (path, x), good in zip(found, finite, strict=True):
        if good:
            continue
        tensors = list(policy.family.hub_tensors(path, x.shape, policy.shapes))
        layers = hosts.fetch(_are_finite(list(x))) if tensors[0].layer is not None else [False]
        raise WeightsError(
            f"{tensors[int(np.argmin(layers))].name} holds numbers that are not finite: the policy "
            f"would learn nothing; download it again, or take weights from before ({folder})"
        )


@jax.jit
def _are_finite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays])


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _convert(transpose: bool, dtype: Any, sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: (x.T if transpose else x).astype(dtype), out_shardings=sharding)


@functools.cache
def _layer_writer(transpose: bool, sharding: Sharding) -> Callable[..., jax.Array]:
    """Returns the program that writes one layer into a stack, in the stack's own memory."""

    def write_layer(stack: jax.Array, x: jax.Array, layer: jax.Array) -> jax.Array:
        x = (x.T if transpose else x).astype(stack.dtype)
        return jax.lax.dynamic_update_index_in_dim(stack, x, layer, 0)

    return jax.jit(write_layer, out_shardings=sharding, donate_argnums=0)


def _put(tree: Params, path: str, value: jax.Array) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value
