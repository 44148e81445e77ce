"""Sizes and special ids of a policy: what all families have, and what reads them."""

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from emor3_jax.models.checks import MAX_SIZE, check_sizes
from emor3_jax.models.decoder import DecoderShapes
from emor3_jax.models.errors import ShapesError
from emor3_jax.models.vision import VisionShapes

_HUB_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
"""Field of `Shapes` → its name in a `config.json`, where that is another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes(abc.ABC):
    """A policy: vision tower, decoder and special ids. Hashable, so static under jit.

    Attributes:
      vision: the vision tower.
      vocab_size: `V`, rows of the embedding.
      hidden_size: `D`.
      intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: the decoder's layers.
      rms_norm_eps: added to the mean square in the decoder's norms (the vision tower's is 1e-6).
      rope_theta: base of the decoder's rope.
      mrope_section: frequencies that follow the temporal, height and width position.
      tie_word_embeddings: whether the head is the embedding.
      image_token_id: id that stands for a feature of an image.
      video_token_id, vision_start_token_id, vision_end_token_id: other ids of images.
      bos_token_id, eos_token_id, pad_token_id: ids of text.
      max_position_embeddings: positions that the policy was trained for.
    """

    vision: VisionShapes
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool = False
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645
    pad_token_id: int | None = None
    max_position_embeddings: int

    def __post_init__(self) -> None:
        check_sizes(self, "", _HUB_NAMES)
        if self.num_heads % self.num_kv_heads:
            raise ShapesError(
                f"num_attention_heads={self.num_heads} must be a multiple of num_key_value_heads="
                f"{self.num_kv_heads}"
            )
        if 2 * sum(self.mrope_section) != self.head_dim or len(self.mrope_section) != 3:
            raise ShapesError(
                f"mrope_section={self.mrope_section} must be three numbers whose sum is half of "
                f"head_dim={self.head_dim}"
            )
        if self.vision.out_hidden_size != self.hidden_size:
            raise ShapesError(
                f"vision out_hidden_size={self.vision.out_hidden_size} differs from the decoder's "
                f"hidden_size={self.hidden_size}: image features could not replace embeddings"
            )

    @property
    @abc.abstractmethod
    def decoder(self) -> DecoderShapes:
        """What the decoder is made of."""

    def make_decoder(self, rope_axes: Iterable[int], **options: Any) -> DecoderShapes:
        """Returns `decoder` with what the family decides.

        Args:
          rope_axes: see `DecoderShapes`.
          **options: further fields of it.
        """
        names = {field.name for field in dataclasses.fields(self)} & set(DecoderShapes._fields)
        common = {name: getattr(self, name) for name in names}
        return DecoderShapes(**common, rope_axes=tuple(map(int, rope_axes)), **options)

    @abc.abstractmethod
    def to_hf(self) -> dict[str, Any]:
        """Returns the contents of a `config.json`."""

    @property
    def merge_unit(self) -> int:
        """Patches of one image token."""
        return self.vision.merge_unit

    @property
    def cut_by_tensor(self) -> dict[str, int]:
        """Names in `config.json` → sizes that the mesh axis `tensor` must divide."""
        return {
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "vision_config.num_heads": self.vision.num_heads,
            "vision_config.intermediate_size": self.vision.intermediate_size,
        }

    @property
    def cut_by_fsdp(self) -> dict[str, int]:
        """Names in `config.json` → sizes that the mesh axis `fsdp` must divide."""
        return {
            "hidden_size": self.hidden_size,
            "vision_config.hidden_size": self.vision.hidden_size,
        }

    def text_to_hf(self) -> dict[str, Any]:
        """Returns the fields of the decoder as a `config.json` names them, without rope's kind."""
        return {
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }

    def ids_to_hf(self) -> dict[str, int]:
        """Returns the ids of images as a `config.json` names them."""
        return {
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
        }


class SmallSizes(NamedTuple):
    """Sizes of a small policy that a family's `small_config` describes.

    Attributes:
      vocab_size, width, layers, heads, kv_heads: of the decoder.
      vision_width, vision_layers, vision_heads: of the tower.
      patch: side of a patch in pixels.
      window: side in pixels of the windows that some families' layers attend in.
      image: side in pixels of the images that it is for.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    patch: int
    window: int
    image: int

    def tower(self) -> dict[str, int]:
        """Returns the fields of a `vision_config` that all families have."""
        return {
            "depth": self.vision_layers,
            "hidden_size": self.vision_width,
            "intermediate_size": 2 * self.vision_width,
            "num_heads": self.vision_heads,
            "patch_size": self.patch,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": self.width,
        }

    def text(self) -> dict[str, Any]:
        """Returns the fields of the decoder that all families have, but for rope's kind."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
            "max_position_embeddings": 4096,
        }


def need(source: Mapping[str, Any], where: str, *names: str) -> Any:
    """Returns the first of some fields that is there.

    Args:
      source: part of a `config.json`.
      where: what it is part of, for the error.
      *names: of the field.

    Raises:
      ShapesError: if there is none.
    """
    for name in names:
        if source.get(name) is not None:
            return source[name]
    raise ShapesError(f"config.json: {where} has no {' or '.join(names)}")


def need_section(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a part of a `config.json`; raises ShapesError if it is missing or no object."""
    value = need(data, "the file", name)
    if not isinstance(value, Mapping):
        raise ShapesError(f"config.json has {name}={str(value)[:80]}, which must be an object")
    return value


def need_list(source: Mapping[str, Any], where: str, name: str) -> tuple[Any, ...]:
    """Returns a list of a `config.json`; raises ShapesError if it is missing or none."""
    value = need(source, where, name)
    if not isinstance(value, list | tuple):
        raise ShapesError(
            f"config.json: {where} has {name}={str(value)[:80]!r}, which must be a list of whole "
            "numbers"
        )
    return tuple(value)


def refuse_unless(ok: bool, what: str, value: Any) -> None:
    """Raises ShapesError, by its name and value, if something is not implemented."""
    if not ok:
        raise ShapesError(f"config.json asks for {what} ({value!r}), which is not implemented")


def rope_of(part: Mapping[str, Any], *kinds: str) -> Mapping[str, Any]:
    """Returns the settings of rope in either spelling.

    The hub's `rope_scaling` goes first where a file has both, as in transformers 5.

    Args:
      part: of a `config.json`.
      *kinds: of rope that are implemented; "default" and "mrope" if none is given.

    Raises:
      ShapesError: for other kinds of rope.
    """
    name = "rope_scaling" if part.get("rope_scaling") else "rope_parameters"
    rope = part.get(name) or {}
    if not isinstance(rope, Mapping):
        raise ShapesError(f"config.json has {name}={str(rope)[:80]!r}, which must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    refuse_unless(kind in (kinds or ("default", "mrope")), f"rope type {kind!r}", rope)
    return rope


_TOWER_THETA = 10_000


def check_tower_rope(vision: Mapping[str, Any]) -> None:
    """Raises ShapesError for a rope of the vision tower but the one that is run.

    transformers 5 can write others.
    """
    rope = rope_of(vision, "default", "axial")
    theta = rope.get("rope_theta", vision.get("rope_theta", _TOWER_THETA))
    refuse_unless(theta == _TOWER_THETA, "vision rope_theta", theta)


def common_fields(data: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the fields of `Shapes` but for the tower and the width of a head.

    Args:
      data: the contents of a `config.json`.
      text: its part about the decoder.

    Raises:
      ShapesError: if one is missing, or asks for something that is not implemented.
    """
    act = text.get("hidden_act", "silu")
    refuse_unless(act == "silu", "hidden_act", act)
    rope = rope_of(text)

    def text_id(name: str) -> int | None:
        value = text.get(name, data.get(name))
        return value[0] if isinstance(value, list) and value else value

    where = "the decoder"
    ids = {name: need(data, "the file", name) for name in _IMAGE_IDS}
    vocab_size = need(text, where, "vocab_size")
    for name, value in ids.items():
        # Other types are named by `check_sizes`.
        if isinstance(value, int) and isinstance(vocab_size, int) and value >= vocab_size:
            raise ShapesError(
                f"config.json has {name}={value!r}, which must be under {vocab_size=}"
            )
    num_heads = need(text, where, "num_attention_heads")
    kv_heads = text.get("num_key_value_heads")
    theta = rope.get("rope_theta")
    return {
        "vocab_size": vocab_size,
        "hidden_size": need(text, where, "hidden_size"),
        "intermediate_size": need(text, where, "intermediate_size"),
        "num_layers": need(text, where, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_heads if kv_heads is None else kv_heads,
        "rms_norm_eps": need(text, where, "rms_norm_eps"),
        "rope_theta": _as_float(need(text, where, "rope_theta") if theta is None else theta),
        "mrope_section": need_list(rope, "rope_scaling", "mrope_section"),
        "tie_word_embeddings": _is_tied(data, text),
        **ids,
        "bos_token_id": text_id("bos_token_id"),
        "eos_token_id": text_id("eos_token_id"),
        "pad_token_id": text_id("pad_token_id"),
        "max_position_embeddings": need(text, where, "max_position_embeddings"),
    }


def _as_float(value: Any) -> Any:
    """Returns a whole number as a float; what is no number stays, for `check_sizes` to name."""
    known = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if known and abs(value) < MAX_SIZE else value


_IMAGE_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _is_tied(data: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Reads `tie_word_embeddings`; the outer field decides, as in transformers 5."""
    for part in (data, text):
        value = part.get("tie_word_embeddings")
        if isinstance(value, bool):
            return value
        if value is not None:
            raise ShapesError(
                f"config.json has tie_word_embeddings={str(value)[:80]!r}, which must be true or "
                "false"
            )
    return False
