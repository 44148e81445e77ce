"""FLOPs of one image and of one text, from the shapes of the policy.

Token and patch counts may be integers, which give integer results, or means over a batch.
"""

import dataclasses

from emor3_jax.models.family import Shapes

Number = int | float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Tokens, images and FLOPs of one phase of a step; costs can be added.

    Attributes:
      tokens: decoder tokens in forward equivalents: those of the update count three times.
      images: images that went through the vision tower.
      vision_passes: the same in forward equivalents.
      linear: FLOPs of matrix products with parameters: vision tower, decoder, and the vocabulary
        projection where logits are computed. Forward and backward.
      attention: FLOPs of products of queries, keys and values. Forward and backward.
      recomputed: FLOPs that rematerialisation repeats; counted in neither of the two above.
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


def vision_flops(policy: Shapes, patches: Number) -> Cost:
    """Returns the cost of one forward pass of one image through the vision tower.

    Args:
      policy: its shapes.
      patches: N of the image.
    """
    linear = policy.vision.linear_flops(patches)
    attention = policy.vision.attention_flops(patches)
    return Cost(images=1, vision_passes=1, linear=linear, attention=attention)


def decoder_flops(
    policy: Shapes, tokens: Number, *, before: Number = 0, logits: Number = 0
) -> Cost:
    """Returns the cost of one forward pass of one text through the decoder, with causal attention.

    Args:
      policy: its shapes.
      tokens: tokens of this pass.
      before: tokens whose keys and values are cached already.
      logits: number of tokens whose logits are computed.
    """
    # Token i attends to before + i keys, itself included; twice the sum over i is an integer.
    pairs_twice = tokens * (tokens + 1 + 2 * before)
    attention = 2 * policy.num_layers * policy.num_heads * policy.head_dim * pairs_twice
    linear = decoder_linear_flops(policy, tokens) + logits_flops(policy, logits)
    return Cost(tokens=tokens, linear=linear, attention=attention)


def decoder_linear_flops(policy: Shapes, tokens: Number, *, last_product: bool = True) -> Number:
    """Returns the FLOPs of the decoder layers' products with their parameters.

    Args:
      policy: its shapes.
      tokens: tokens that pass through the layers.
      last_product: False leaves out the last product of each layer, `down_proj`.
    """
    c = policy
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    mlp = c.hidden_size * c.intermediate_size * (3 if last_product else 2)
    return 2 * tokens * c.num_layers * (attention + mlp)


def logits_flops(policy: Shapes, tokens: Number) -> Number:
    """Returns the FLOPs of the logits of `tokens` tokens."""
    return 2 * tokens * policy.hidden_size * policy.vocab_size
