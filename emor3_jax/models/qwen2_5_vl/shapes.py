"""Shapes and ids of a Qwen2.5-VL policy, read from and written to Hugging Face's `config.json`.

Deviations, numbered:
 1. Only what the published checkpoints use is implemented: SiLU, plain multimodal rope, full causal
    attention. A file that asks for anything else is refused by name instead of run wrongly.
"""

import dataclasses
from typing import Any

from emor3_jax.models.errors import ShapesError


@dataclasses.dataclass(frozen=True)
class Qwen25VLVisionShapes:
    """The vision tower.

    Attributes:
      depth: number of layers.
      hidden_size, intermediate_size, num_heads: widths of a layer.
      patch_size: side of a patch in pixels.
      temporal_patch_size: frames of a patch; a still image is repeated.
      spatial_merge_size: m; m * m neighbouring patches become one token of the decoder.
      window_size: side of an attention window in pixels.
      fullatt_block_indexes: layers that attend to the whole image.
      out_hidden_size: width of the decoder.
      in_channels: colours of a pixel.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    out_hidden_size: int
    in_channels: int = 3

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.num_heads):
            raise ShapesError(
                f"vision hidden_size={self.hidden_size} over num_heads={self.num_heads} must give "
                "heads of a multiple of 4: two coordinates, each rotated in pairs"
            )
        if self.window_size % (self.patch_size * self.spatial_merge_size):
            raise ShapesError(
                f"vision window_size={self.window_size} must be a multiple of patch_size * "
                f"spatial_merge_size = {self.patch_size * self.spatial_merge_size}"
            )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers of one flattened patch."""
        return self.temporal_patch_size * self.frame_dim

    @property
    def frame_dim(self) -> int:
        """Numbers of one frame of a patch; the frames of a still image are equal."""
        return self.in_channels * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches of one token."""
        return self.spatial_merge_size**2

    @property
    def window_side(self) -> int:
        """Merged tokens along the side of a window."""
        return self.window_size // self.patch_size // self.spatial_merge_size

    @property
    def window_patches(self) -> int:
        """`L`, patches of one window."""
        return self.window_side**2 * self.merge_unit


@dataclasses.dataclass(frozen=True)
class Qwen25VLShapes:
    """A Qwen2.5-VL policy: vision tower, decoder and special ids. Hashable, so static under jit.

    Attributes:
      vision: the vision tower.
      vocab_size: `V`, rows of the embedding.
      hidden_size: `D`.
      intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: the decoder's layers.
      rms_norm_eps: added to the mean square in the decoder's norms (the vision tower's is 1e-6).
      rope_theta: base of the decoder's rope.
      mrope_section: frequencies that follow the temporal, height and width position.
      tie_word_embeddings: whether the head is the embedding.
      image_token_id, video_token_id, vision_start_token_id, vision_end_token_id: ids of images.
      bos_token_id, eos_token_id, pad_token_id: ids of text.
      max_position_embeddings: positions that the policy was trained for.
    """

    vision: Qwen25VLVisionShapes
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    tie_word_embeddings: bool = False
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645
    pad_token_id: int | None = None
    max_position_embeddings: int = 128_000

    def __post_init__(self) -> None:
        if self.head_dim * self.num_heads != self.hidden_size:
            raise ShapesError(
                f"hidden_size={self.hidden_size} is not num_heads={self.num_heads} * "
                f"head_dim={self.head_dim}, which Qwen2.5-VL's decoder requires"
            )
        if self.num_heads % self.num_kv_heads:
            raise ShapesError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
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

    @classmethod
    def from_hf(cls, data: dict[str, Any]) -> "Qwen25VLShapes":
        """Reads the contents of a `config.json`, flat (the hub) or nested (transformers 5).

        Args:
          data: the parsed file.

        Raises:
          ShapesError: if a field is missing or asks for something that is not implemented.
        """
        if data.get("model_type") != "qwen2_5_vl":
            raise ShapesError(
                f"config.json has model_type={data.get('model_type')!r}; only 'qwen2_5_vl' "
                "policies can be loaded"
            )
        text = {**data, **(data.get("text_config") or {})}
        vision = dict(data.get("vision_config") or {})
        rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        _refuse_unless(text.get("hidden_act", "silu") == "silu", "hidden_act", text)
        _refuse_unless(vision.get("hidden_act", "silu") == "silu", "vision hidden_act", vision)
        _refuse_unless(not text.get("use_sliding_window"), "use_sliding_window", text)
        kind = rope.get("rope_type", rope.get("type", "default"))
        _refuse_unless(kind in ("default", "mrope"), f"rope type {kind!r}", rope)

        def need(source: dict[str, Any], where: str, *names: str) -> Any:
            for name in names:
                if source.get(name) is not None:
                    return source[name]
            raise ShapesError(f"config.json: {where} has no {' or '.join(names)}")

        def text_id(name: str) -> int | None:
            value = text.get(name, data.get(name))
            return value[0] if isinstance(value, list) else value

        tower = Qwen25VLVisionShapes(
            **{
                name: need(vision, "vision_config", name)
                for name in (
                    "depth",
                    "hidden_size",
                    "intermediate_size",
                    "num_heads",
                    "patch_size",
                    "temporal_patch_size",
                    "spatial_merge_size",
                    "window_size",
                    "out_hidden_size",
                )
            },
            fullatt_block_indexes=tuple(need(vision, "vision_config", "fullatt_block_indexes")),
            in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
        )
        hidden_size = need(text, "the decoder", "hidden_size")
        num_heads = need(text, "the decoder", "num_attention_heads")
        return cls(
            vision=tower,
            vocab_size=need(text, "the decoder", "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=need(text, "the decoder", "intermediate_size"),
            num_layers=need(text, "the decoder", "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=text.get("num_key_value_heads") or num_heads,
            head_dim=text.get("head_dim") or hidden_size // num_heads,
            rms_norm_eps=need(text, "the decoder", "rms_norm_eps"),
            rope_theta=float(rope.get("rope_theta") or need(text, "the decoder", "rope_theta")),
            mrope_section=tuple(need(rope, "rope_scaling", "mrope_section")),
            tie_word_embeddings=bool(
                data.get("tie_word_embeddings") or text.get("tie_word_embeddings")
            ),
            image_token_id=need(data, "the file", "image_token_id"),
            video_token_id=need(data, "the file", "video_token_id"),
            vision_start_token_id=need(data, "the file", "vision_start_token_id"),
            vision_end_token_id=need(data, "the file", "vision_end_token_id"),
            bos_token_id=text_id("bos_token_id"),
            eos_token_id=text_id("eos_token_id"),
            pad_token_id=text_id("pad_token_id"),
            max_position_embeddings=need(text, "the decoder", "max_position_embeddings"),
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the contents of a `config.json` in the hub's flat naming."""
        vision = dataclasses.asdict(self.vision)
        vision |= {
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            "fullatt_block_indexes": list(self.vision.fullatt_block_indexes),
            "in_chans": vision.pop("in_channels"),
            "spatial_patch_size": self.vision.patch_size,
            "tokens_per_second": 2,
        }
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "max_window_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": {"type": "mrope", "mrope_section": list(self.mrope_section)},
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": True,
            "vocab_size": self.vocab_size,
            "vision_config": vision,
        }


def _refuse_unless(ok: bool, what: str, source: dict[str, Any]) -> None:
    if not ok:
        value = source.get(what.split()[-1], source)
        raise ShapesError(f"config.json asks for {what} ({value!r}), which is not implemented")
