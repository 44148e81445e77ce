"""Shapes and ids of a Qwen2.5-VL policy, read from and written to Hugging Face's `config.json`.

Deviations, numbered:
 1. Only what the published checkpoints use is implemented: SiLU, plain multimodal rope, full causal
    attention. A file that asks for anything else is refused by name instead of run wrongly.
"""

import dataclasses
from typing import Any

import numpy as np

from emor3_jax.models.decoder import DecoderShapes
from emor3_jax.models.errors import ShapesError
from emor3_jax.models.shapes import (
    Shapes,
    SmallSizes,
    check_tower_rope,
    common_fields,
    need,
    need_list,
    need_section,
    refuse_unless,
)
from emor3_jax.models.vision import TOWER_FIELDS, VisionShapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen25VLVisionShapes(VisionShapes):
    """The vision tower.

    Attributes:
      window_size: side of an attention window in pixels.
      fullatt_block_indexes: layers that attend to the whole image.
    """

    window_size: int
    fullatt_block_indexes: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_size % (self.patch_size * self.spatial_merge_size):
            raise ShapesError(
                f"vision window_size={self.window_size} must be a multiple of patch_size * "
                f"spatial_merge_size = {self.patch_size * self.spatial_merge_size}"
            )

    @property
    def window_side(self) -> int:
        """Merged tokens along the side of a window."""
        return self.window_size // self.patch_size // self.spatial_merge_size

    @property
    def window_patches(self) -> int:
        """`L`, patches of one window."""
        return self.window_side**2 * self.merge_unit

    def linear_flops(self, patches: float) -> float:
        """Returns the FLOPs of all products with parameters, for one image of N patches."""
        # Patch embedding and merger. A row of the merger joins `merge_unit` patches: per patch, its
        # two products use a `merge_unit`th of their parameters.
        ends = self.patch_dim + self.merge_unit * self.hidden_size + self.out_hidden_size
        return 2 * patches * ends * self.hidden_size + self.layer_flops(patches)

    def layer_flops(self, patches: float, *, last_product: bool = True) -> float:
        """Returns the part of `linear_flops` that the layers have; see `vision.VisionShapes`."""
        mlp = self.hidden_size * self.intermediate_size * (3 if last_product else 2)
        return 2 * patches * self.depth * (4 * self.hidden_size**2 + mlp)

    def attention_flops(self, patches: float) -> float:
        """Returns the attention FLOPs of all layers, for one image of N patches.

        A patch attends to its whole window, or, in the layers of full attention, to the whole
        image.
        """
        full = sum(layer < self.depth for layer in self.fullatt_block_indexes)
        keys = full * patches + (self.depth - full) * min(self.window_patches, patches)
        return 4 * self.hidden_size * patches * keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen25VLShapes(Shapes):
    """A Qwen2.5-VL policy."""

    vision: Qwen25VLVisionShapes
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    max_position_embeddings: int = 128_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim * self.num_heads != self.hidden_size:
            raise ShapesError(
                f"hidden_size={self.hidden_size} is not num_attention_heads={self.num_heads} * "
                f"head_dim={self.head_dim}, which Qwen2.5-VL's decoder requires"
            )

    @property
    def decoder(self) -> DecoderShapes:
        """What the decoder is made of."""
        return self.make_decoder(np.repeat(np.arange(3), self.mrope_section))

    @classmethod
    def from_hf(cls, data: dict[str, Any]) -> "Qwen25VLShapes":
        """Reads the contents of a `config.json`, flat (the hub) or nested (transformers 5).

        Args:
          data: the parsed file.

        Raises:
          ShapesError: if a field is missing or asks for something that is not implemented.
        """
        inner = need_section(data, "text_config") if data.get("text_config") is not None else {}
        text, vision = {**data, **inner}, need_section(data, "vision_config")
        act = vision.get("hidden_act", "silu")
        refuse_unless(act == "silu", "vision hidden_act", act)
        sliding = text.get("use_sliding_window")
        refuse_unless(not sliding, "use_sliding_window", sliding)
        names = (*TOWER_FIELDS, "window_size", "fullatt_block_indexes")
        tower = {name: need(vision, "vision_config", name) for name in names}
        check_tower_rope(vision)
        tower["fullatt_block_indexes"] = need_list(vision, "vision_config", "fullatt_block_indexes")
        for name in ("in_channels", "in_chans"):
            channels = vision.get(name)
            refuse_unless(channels in (None, 3), f"vision {name}", channels)
        fields = common_fields(data, text)
        head_dim = text.get("head_dim") or _head_dim(fields["hidden_size"], fields["num_heads"])
        tower = Qwen25VLVisionShapes(**tower)
        return cls(vision=tower, head_dim=head_dim, **fields)

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
            **self.text_to_hf(),
            **self.ids_to_hf(),
            "max_window_layers": self.num_layers,
            "rope_scaling": {"type": "mrope", "mrope_section": list(self.mrope_section)},
            "sliding_window": None,
            "use_sliding_window": False,
            "vision_config": vision,
        }


def _head_dim(hidden_size: Any, num_heads: Any) -> int:
    """Returns the width of a head; 1 if a size is wrong, which `check_sizes` then names."""
    try:
        return hidden_size // num_heads
    except (TypeError, ZeroDivisionError):
        return 1


def small_config(sizes: SmallSizes) -> dict[str, Any]:
    """Returns the `config.json` of a small policy, without ids; its last layer sees whole images.

    Args:
      sizes: of the policy.
    """
    tower = sizes.tower() | {
        "window_size": sizes.window,
        "fullatt_block_indexes": [sizes.vision_layers - 1],
    }
    half = sizes.width // sizes.heads // 2
    spatial = 3 * half // 8
    section = [half - 2 * spatial, spatial, spatial]
    return {
        "model_type": "qwen2_5_vl",
        "vision_config": tower,
        **sizes.text(),
        "rope_scaling": {"type": "mrope", "mrope_section": section},
        "tie_word_embeddings": True,
    }
