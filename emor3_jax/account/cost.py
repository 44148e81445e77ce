"""Matrix products of one picture and of one text, from the shapes of the policy.

Numbers of tokens and patches may be whole numbers, and then all results are, or means.
"""

import dataclasses
from typing import Any as VisionConfig

from emor3_jax.models.family import Shapes as Config

Number = int | float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a phase costs; costs can be added.

    Attributes:
      tokens: that the decoder read, in forward equivalents: those of the update count three times.
      images: pictures that went through the vision tower.
      vision_passes: the same in forward equivalents.
      linear: FLOPs of products with parameters: tower, decoder, and the vocabulary where logits
        are computed. Forward and backward.
      attention: FLOPs of products of queries, keys and values. Forward and backward.
      recomputed: FLOPs that rematerialisation repeats, in neither of the two above.
    """

    tokens: Number = 0
    images: Number = 0
    vision_passes: Number = 0
    linear: Number = 0
    attention: Number = 0
    recomputed: Number = 0

    @property
    def flops(self) -> Number:
        """FLOPs that the model needs."""
        return self.linear + self.attention

    @property
    def executed(self) -> Number:
        """FLOPs that are executed."""
        return self.flops + self.recomputed

    def __add__(self, other: "Cost") -> "Cost":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Cost(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def times(self, count: Number) -> "Cost":
        """Returns the cost of doing this `count` times."""
        return Cost(*(count * value for value in dataclasses.astuple(self)))


def look(config: Config, patches: Number) -> Cost:
    """Returns the cost of one picture through the vision tower, forward.

    Args:
      config: of the policy.
      patches: N of the picture.
    """
    c = config.vision
    # Patch embedding and merger. A row of the merger joins `merge_unit` patches: by patch, its two
    # products take a `merge_unit`th of their parameters.
    ends = c.patch_dim + c.merge_unit * c.hidden_size + c.out_hidden_size
    linear = 2 * patches * ends * c.hidden_size + tower_flops(c, patches)
    attention = tower_attention_flops(c, patches)
    return Cost(images=1, vision_passes=1, linear=linear, attention=attention)


def read(config: Config, tokens: Number, *, before: Number = 0, logits: Number = 0) -> Cost:
    """Returns the cost of one text through the decoder, forward, each token seeing those before it.

    Args:
      config: of the policy.
      tokens: read now.
      before: tokens whose keys and values are there already.
      logits: for how many tokens logits are computed.
    """
    # Token i sees before + i keys, itself among them; twice the sum over i has no fraction.
    pairs_twice = tokens * (tokens + 1 + 2 * before)
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * pairs_twice
    linear = decoder_flops(config, tokens) + logits_flops(config, logits)
    return Cost(tokens=tokens, linear=linear, attention=attention)


def decoder_flops(config: Config, tokens: Number, *, last_product: bool = True) -> Number:
    """Returns FLOPs of the layers' products with their parameters.

    Args:
      config: of the policy.
      tokens: that pass through the layers.
      last_product: False leaves out the last product of each layer, `down_proj`.
    """
    c = config
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    mlp = c.hidden_size * c.intermediate_size * (3 if last_product else 2)
    return 2 * tokens * c.num_layers * (attention + mlp)


def logits_flops(config: Config, tokens: Number) -> Number:
    """Returns FLOPs of the logits of `tokens` tokens."""
    return 2 * tokens * config.hidden_size * config.vocab_size


def tower_flops(config: VisionConfig, patches: Number, *, last_product: bool = True) -> Number:
    """Returns FLOPs of the products of the tower's layers with their parameters, for one picture.

    Args:
      config: of the tower.
      patches: N of the picture.
      last_product: False leaves out the last product of each layer, `down_proj`.
    """
    mlp = config.hidden_size * config.intermediate_size * (3 if last_product else 2)
    return 2 * patches * config.depth * (4 * config.hidden_size**2 + mlp)


def tower_attention_flops(config: VisionConfig, patches: Number) -> Number:
    """Returns FLOPs of the attention of all layers of the tower, for one picture of N patches.

    A patch sees its whole window, or, in the full layers, the whole picture.
    """
    full = sum(layer < config.depth for layer in config.fullatt_block_indexes)
    keys = full * patches + (config.depth - full) * min(config.window_patches, patches)
    return 4 * config.hidden_size * patches * keys
