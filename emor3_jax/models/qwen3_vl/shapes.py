"""Shapes and ids of a Qwen3-VL policy, read from and written to Hugging Face's `config.json`.

Deviations, numbered:
 1. Only what the published dense checkpoints use is implemented. A file that asks for anything else
    is refused by name instead of run wrongly.
"""

import dataclasses
import math
from typing import Any

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
    rope_of,
)
from emor3_jax.models.vision import TOWER_FIELDS, VisionShapes

WINDOW_PATCHES = 64
"""Patches of a window, in which images are padded; attention knows none. As many as the published
Qwen2.5-VL's, so that the sizes of a config fit both."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3VLVisionShapes(VisionShapes):
    """The vision tower.

    Attributes:
      num_position_embeddings: rows of the learned table of positions, a square.
      deepstack_visual_indexes: layers whose results the first layers of the decoder also see.
    """

    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.isqrt(self.num_position_embeddings) ** 2 != self.num_position_embeddings:
            raise ShapesError(
                f"vision num_position_embeddings={self.num_position_embeddings} must be a square"
            )
        layers = self.deepstack_visual_indexes
        if list(layers) != sorted(set(layers)) or not all(0 <= i < self.depth for i in layers):
            raise ShapesError(
                f"vision deepstack_visual_indexes={list(layers)} must rise, from 0 to "
                f"depth - 1 = {self.depth - 1}"
            )
        if WINDOW_PATCHES % self.merge_unit:
            raise ShapesError(
                f"vision spatial_merge_size={self.spatial_merge_size}: its square must divide "
                f"{WINDOW_PATCHES}"
            )

    @property
    def window_patches(self) -> int:
        """`L`, patches of one window, in which images are padded."""
        return WINDOW_PATCHES

    @property
    def mergers(self) -> tuple[str, ...]:
        """Names of the mergers: DeepStack has one for each layer that the decoder also sees."""
        deepstack = (f"deepstack_{i}" for i in range(len(self.deepstack_visual_indexes)))
        return (*super().mergers, *deepstack)

    @property
    def table_side(self) -> int:
        """Rows and columns of the learned table of positions."""
        return math.isqrt(self.num_position_embeddings)

    def linear_flops(self, patches: float) -> float:
        """Returns the FLOPs of all products with parameters, for one image of N patches."""
        # Each merger joins `merge_unit` patches: per patch, its two products use a `merge_unit`th
        # of their parameters.
        mergers = len(self.mergers)
        ends = self.patch_dim + mergers * (
            self.merge_unit * self.hidden_size + self.out_hidden_size
        )
        return 2 * patches * ends * self.hidden_size + self.layer_flops(patches)

    def layer_flops(self, patches: float, *, last_product: bool = True) -> float:
        """Returns the part of `linear_flops` that the layers have; see `vision.VisionShapes`."""
        mlp = self.hidden_size * self.intermediate_size * (2 if last_product else 1)
        return 2 * patches * self.depth * (4 * self.hidden_size**2 + mlp)

    def attention_flops(self, patches: float) -> float:
        """Returns the attention FLOPs of all layers, which see the whole image of N patches."""
        return 4 * self.hidden_size * patches * patches * self.depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3VLShapes(Shapes):
    """A dense Qwen3-VL policy."""

    vision: Qwen3VLVisionShapes
    rope_theta: float = 5_000_000.0
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    max_position_embeddings: int = 262_144

    def __post_init__(self) -> None:
        super().__post_init__()
        _, height, width = self.mrope_section
        if 3 * max(height, width) > self.head_dim // 2:
            raise ShapesError(
                f"mrope_section={self.mrope_section}: three times height and width must fit into "
                f"half of head_dim={self.head_dim}, as every third frequency follows them"
            )
        if len(self.vision.deepstack_visual_indexes) > self.num_layers:
            raise ShapesError(
                f"vision deepstack_visual_indexes={list(self.vision.deepstack_visual_indexes)} "
                f"are more than the decoder's num_hidden_layers={self.num_layers}"
            )

    @property
    def decoder(self) -> DecoderShapes:
        """What the decoder is made of."""
        return self.make_decoder(
            map(self._axis, range(self.head_dim // 2)),
            qkv_bias=False,
            qk_norm=True,
            deepstack=len(self.vision.deepstack_visual_indexes),
        )

    def _axis(self, frequency: int) -> int:
        """Returns the position that a frequency follows: height and width take turns with time."""
        axis = frequency % 3
        return axis if frequency < 3 * self.mrope_section[axis] else 0

    @classmethod
    def from_hf(cls, data: dict[str, Any]) -> "Qwen3VLShapes":
        """Reads the contents of a `config.json`, as on the hub or as transformers 5 writes it.

        Args:
          data: the parsed file.

        Raises:
          ShapesError: if a field is missing or asks for something that is not implemented.
        """
        text, vision = need_section(data, "text_config"), need_section(data, "vision_config")
        act = vision.get("hidden_act", "gelu_pytorch_tanh")
        refuse_unless(act == "gelu_pytorch_tanh", "vision hidden_act", act)
        channels = vision.get("in_channels")
        refuse_unless(channels in (None, 3), "vision in_channels", channels)
        bias = text.get("attention_bias")
        refuse_unless(not bias, "attention_bias", bias)
        # Without the field, transformers interleaves too.
        interleaved = rope_of(text).get("mrope_interleaved", True)
        refuse_unless(interleaved, "mrope_interleaved", interleaved)
        names = (*TOWER_FIELDS, "num_position_embeddings", "deepstack_visual_indexes")
        tower = {name: need(vision, "vision_config", name) for name in names}
        check_tower_rope(vision)
        where = "vision_config"
        tower["deepstack_visual_indexes"] = need_list(vision, where, "deepstack_visual_indexes")
        tower = Qwen3VLVisionShapes(**tower)
        head_dim = need(text, "the decoder", "head_dim")
        return cls(vision=tower, head_dim=head_dim, **common_fields(data, text))

    def to_hf(self) -> dict[str, Any]:
        """Returns the contents of a `config.json` as on the hub."""
        vision = dataclasses.asdict(self.vision)
        vision |= {
            "model_type": "qwen3_vl",
            "hidden_act": "gelu_pytorch_tanh",
            "deepstack_visual_indexes": list(self.vision.deepstack_visual_indexes),
        }
        rope = {
            "rope_type": "default",
            "mrope_interleaved": True,
            "mrope_section": list(self.mrope_section),
        }
        text = {
            "model_type": "qwen3_vl_text",
            **self.text_to_hf(),
            "attention_bias": False,
            "head_dim": self.head_dim,
            "rope_scaling": rope,
        }
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            **self.ids_to_hf(),
            "tie_word_embeddings": self.tie_word_embeddings,
            "text_config": text,
            "vision_config": vision,
        }


def small_config(sizes: SmallSizes) -> dict[str, Any]:
    """Returns the `config.json` of a small policy, without ids.

    All layers of the tower but the last, at most three, also reach the decoder (DeepStack); heads
    are as wide as the hidden size over their number.

    Args:
      sizes: of the policy.
    """
    deepstack = min(max(sizes.vision_layers - 1, 1), 3, sizes.layers)
    tower = sizes.tower() | {
        "num_position_embeddings": (sizes.image // sizes.patch) ** 2,
        "deepstack_visual_indexes": list(range(deepstack)),
    }
    head_dim = sizes.width // sizes.heads
    spatial = head_dim // 6
    section = [head_dim // 2 - 2 * spatial, spatial, spatial]
    text = sizes.text() | {
        "head_dim": head_dim,
        "rope_scaling": {"rope_type": "default", "mrope_section": section},
    }
    return {
        "model_type": "qwen3_vl",
        "vision_config": tower,
        "text_config": text,
        "tie_word_embeddings": True,
    }
