import json

import pytest
from support import tiny

from emor3_jax.models import parse_config, published
from emor3_jax.models.errors import ShapesError
from emor3_jax.models.params import parameter_overview
from emor3_jax.models.qwen2_5_vl.shapes import Qwen25VLShapes

HUB_3B = {
    "model_type": "qwen2_5_vl",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "temporal_patch_size": 2,
    },
}


def test_the_published_3b_has_its_published_size():
    policy = parse_config(HUB_3B)
    assert policy.shapes.head_dim == 128
    assert policy.shapes.vision.window_patches == 64
    assert parameter_overview(policy.param_shapes()).splitlines()[-1].split() == [
        "total",
        "3,754,622,976",
    ]


def test_published_shapes_are_those_of_the_hubs_file():
    policy = published("Qwen/Qwen2.5-VL-3B-Instruct")
    assert policy.shapes == Qwen25VLShapes.from_hf(HUB_3B)
    assert published("Qwen/Qwen2.5-VL-3B-Instruct@main") == policy
    assert published("Qwen/Qwen2.5-VL-1B-Instruct") is None


def test_round_trip_through_json():
    untied = tiny.make_policy(tie_word_embeddings=False).shapes
    for shapes in (Qwen25VLShapes.from_hf(HUB_3B), untied):
        assert Qwen25VLShapes.from_hf(json.loads(json.dumps(shapes.to_hf()))) == shapes


def test_nested_form_of_transformers_5_reads_the_same():
    flat = dict(HUB_3B)
    text_names = [name for name in flat if name not in ("vision_config", "model_type")]
    outer = ("tie_word_embeddings", "image_token_id", "video_token_id")
    outer += ("vision_start_token_id", "vision_end_token_id")
    text = {name: flat[name] for name in text_names if name not in outer}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "mrope_section": text.pop("rope_scaling")["mrope_section"],
    }
    nested = {name: flat[name] for name in (*outer, "vision_config", "model_type")}
    assert Qwen25VLShapes.from_hf({**nested, "text_config": text}) == Qwen25VLShapes.from_hf(flat)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, "yarn"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 20]}}, "mrope_section"),
        ({"vocab_size": None}, "no vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_attention_heads": "16"}, "num_attention_heads='16' must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a whole number"),
        ({"rope_scaling": {"mrope_section": "abc"}}, "mrope_section='abc', which must be a list"),
        (
            {"vision_config": {**HUB_3B["vision_config"], "fullatt_block_indexes": 7}},
            "fullatt_block_indexes='7', which must be a list",
        ),
        ({"text_config": []}, r"text_config=\[\], which must be an object"),
        ({"vision_config": None}, "no vision_config"),
        (
            {"vision_config": {**HUB_3B["vision_config"], "depth": "32"}},
            "depth='32' must be a whole",
        ),
        ({"vision_config": {**HUB_3B["vision_config"], "in_chans": 4}}, "in_chans"),
        ({"vision_config": {**HUB_3B["vision_config"], "window_size": 100}}, "window_size=100"),
        ({"vision_config": {**HUB_3B["vision_config"], "out_hidden_size": 99}}, "=99"),
    ],
)
def test_what_cannot_run_is_refused_by_name(changes, message):
    with pytest.raises(ShapesError, match=message):
        parse_config({**HUB_3B, **changes})
