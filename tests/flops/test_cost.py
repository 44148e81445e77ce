"""FLOPs of layers against XLA's own count, and of a token against the parameters."""

import dataclasses

import jax
import pytest
from support import tiny
from support.tiny_flops import TINY, array, policy_of, prompt_shapes

from emor3_jax.flops.cost import decoder_flops, decoder_linear_flops, logits_flops, vision_flops
from emor3_jax.models import published
from emor3_jax.models.layers import Dense
from emor3_jax.models.params import leaves

# XLA counts the body of a loop once: one layer at a time. It counts elementwise work too, which is
# little at these widths. Its causal products are full rectangles.

WIDE = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(
        TINY.vision,
        depth=1,
        hidden_size=128,
        intermediate_size=256,
        num_heads=2,
        patch_size=8,
        window_size=64,
        fullatt_block_indexes=(0,),
        out_hidden_size=256,
    ),
    vocab_size=2000,
    hidden_size=256,
    intermediate_size=768,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mrope_section=(8, 12, 12),
)


def _xla(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_a_dense_layer_and_the_logits_cost_what_xla_counts() -> None:
    layer, x = Dense(96, use_bias=False), array(24, 64)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert _xla(layer.apply, params, x) == 2 * 24 * 64 * 96
    policy = policy_of(WIDE)
    logits = _xla(policy.logits, policy.param_shapes(), array(96, 256))
    assert logits == logits_flops(WIDE, 96)


def test_a_layer_of_the_decoder_costs_what_xla_counts() -> None:
    b, p, policy = 2, 64, policy_of(WIDE)
    found = _xla(
        lambda params, prompt: policy.read_prompt(params, prompt, None),
        policy.param_shapes(),
        prompt_shapes(b, p),
    )
    rectangle = 4 * 4 * 64 * b * p * p
    assert found == pytest.approx(decoder_linear_flops(WIDE, b * p) + rectangle, rel=0.01)
    triangle = decoder_flops(WIDE, p).times(b).attention
    assert triangle == rectangle * (p + 1) / (2 * p)


def test_a_layer_of_the_tower_costs_what_xla_counts() -> None:
    policy = policy_of(WIDE)
    images = policy.layout.abstract_images(2, 1)
    found = _xla(policy.encode_images, policy.param_shapes(), images)
    expected = vision_flops(WIDE, WIDE.vision.window_patches).times(2)
    assert found == pytest.approx(expected.flops, rel=0.03)


def test_a_token_of_the_3b_costs_two_flops_a_parameter() -> None:
    policy = published("Qwen/Qwen2.5-VL-3B-Instruct")
    shapes, params = policy.shapes, policy.param_shapes()
    # Tied: the embedding is the head. Biases and norms are no products.
    parameters = sum(x.size for x in jax.tree.leaves(params["model"]))
    token = decoder_flops(shapes, 1, logits=1).linear
    assert token <= 2 * parameters
    assert token == pytest.approx(2 * parameters, rel=1e-3)
    # A patch passes through all of the tower, but through a quarter of a row of the merger.
    merger = sum(x.size for x in jax.tree.leaves(params["visual"]["merger"]))
    tower = sum(x.size for x in jax.tree.leaves(params["visual"])) - merger
    assert vision_flops(shapes, 1).linear == pytest.approx(2 * (tower + merger / 4), rel=1e-3)


def test_the_second_family_costs_what_its_parameters_and_xla_say() -> None:
    policy = published("Qwen/Qwen3-VL-4B-Instruct")
    shapes, params = policy.shapes, policy.param_shapes()
    parameters = sum(x.size for x in jax.tree.leaves(params["model"]))
    # Heads are wider than the hidden size holds.
    assert decoder_flops(shapes, 1, logits=1).linear == pytest.approx(2 * parameters, rel=1e-3)
    # Of the tower its kernels, of which four mergers see a quarter of the rows.
    kernels = {path: x.size for path, x in leaves(params["visual"]) if path.endswith("kernel")}
    mergers = sum(n for path, n in kernels.items() if path.startswith(("merger", "deepstack")))
    tower = sum(kernels.values()) - mergers
    assert vision_flops(shapes, 1).linear == 2 * (tower + mergers / 4)

    small = dataclasses.replace(
        tiny.make_policy("qwen3_vl").shapes.vision, depth=1, hidden_size=128, intermediate_size=256
    )
    policy = tiny.make_policy("qwen3_vl", vision=small)
    images = policy.layout.abstract_images(2, 1)
    found = _xla(policy.encode_images, policy.param_shapes(), images)
    expected = vision_flops(policy.shapes, policy.shapes.vision.window_patches).times(2)
    assert found == pytest.approx(expected.flops, rel=0.05)
