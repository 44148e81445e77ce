"""A policy and a step small enough to count their FLOPs by hand, and arguments without values."""

import math

import jax
import jax.extend
import jax.numpy as jnp

from emor3_jax.flops import QuestionTokens, StepShapes
from emor3_jax.models import Policy
from emor3_jax.models.qwen2_5_vl.family import QWEN2_5_VL
from emor3_jax.models.qwen2_5_vl.shapes import Qwen25VLShapes, Qwen25VLVisionShapes
from emor3_jax.types import Prompt

TINY = Qwen25VLShapes(
    vision=Qwen25VLVisionShapes(
        depth=2,
        hidden_size=4,
        intermediate_size=6,
        num_heads=1,
        patch_size=1,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=4,
        fullatt_block_indexes=(1,),
        out_hidden_size=8,
    ),
    vocab_size=20,
    hidden_size=8,
    intermediate_size=10,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mrope_section=(1, 1, 0),
    tie_word_embeddings=True,
)

# 32 patches are 8 tokens of the prompt.
STEP = StepShapes(
    prompts=2,
    responses=3,
    prompt_tokens=12,
    response_tokens=5,
    patches=32,
    shared_tokens=9,
    questions={
        "coherence": QuestionTokens(head=3, text=4, tail=2, reply=2),
        "consistency": QuestionTokens(head=1, text=2, tail=2, reply=2, with_image=True),
    },
)

# The sums of TINY, used below:
# decoder, a token: q 8*8, k 8*4, v 8*4, o 8*8, three of 8*10: 432 a layer, 864 in all: 1728 FLOPs.
#   Logits of a token: 2*8*20 = 320. A pair of query and key: 2 layers * 4 * 8 = 64.
# tower, a patch: embedding 6*4 = 24; two layers of 4*4*4 + 3*4*6 = 136; merger (16*16 + 16*8) / 4
#   patches = 96: together 392, so 784 FLOPs; an image 32 * 784 = 25088.
#   Attention: 16 keys in a window, 32 in the full layer: 4*4*32 * (16+32) = 24576 an image.


def array(*shape: int, dtype: type = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def prompt_shapes(b: int, p: int) -> Prompt:
    ints = {"dtype": jnp.int32}
    return Prompt(
        array(b, p, **ints),
        array(b, p, 3, **ints),
        array(b, p, dtype=bool),
        array(b, p, **ints),
    )


def policy_of(shapes: Qwen25VLShapes) -> Policy:
    return Policy(QWEN2_5_VL, shapes)


def products(jaxpr: jax.extend.core.Jaxpr) -> int:
    """FLOPs of all products, those in a loop as often as it turns; of branches the costliest."""
    flops = 0
    for each in jaxpr.eqns:
        if each.primitive.name == "dot_general":
            (contracted, _), _ = each.params["dimension_numbers"]
            left, out = each.invars[0].aval.shape, each.outvars[0].aval.shape
            flops += 2 * math.prod(out) * math.prod(left[i] for i in contracted)
        elif each.primitive.name == "cond":
            flops += max(products(branch.jaxpr) for branch in each.params["branches"])
        else:
            turns = each.params["length"] if each.primitive.name == "scan" else 1
            for inner in jax.tree.leaves(list(each.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    flops += turns * products(getattr(inner, "jaxpr", inner))
    return flops


def _is_jaxpr(x: object) -> bool:
    return isinstance(x, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)
