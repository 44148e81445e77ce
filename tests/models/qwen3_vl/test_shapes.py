import json

import pytest
from support import tiny

from emor3_jax.models import parse_config, published
from emor3_jax.models.errors import ShapesError
from emor3_jax.models.params import count_params
from emor3_jax.models.qwen3_vl.shapes import Qwen3VLShapes

HUB_4B = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [24, 20, 20],
            "rope_type": "default",
        },
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("2B", 2_127_532_032),
        ("4B", 4_437_815_808),
        ("8B", 8_767_123_696),
        ("32B", 33_357_390_064),
    ],
)
def test_published_policies_have_their_published_sizes(size, count):
    policy = published(f"Qwen/Qwen3-VL-{size}-Instruct")
    assert count_params(policy.param_shapes()) == count
    assert published(f"Qwen/Qwen3-VL-{size}-Thinking") == policy


def test_published_shapes_are_those_of_the_hubs_file():
    assert published("Qwen/Qwen3-VL-4B-Instruct") == parse_config(HUB_4B)


def test_what_transformers_5_writes_reads_the_same():
    text = {**HUB_4B["text_config"]}
    rope = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    text["rope_parameters"] = rope
    del text["tie_word_embeddings"]
    assert parse_config(HUB_4B | {"text_config": text}) == parse_config(HUB_4B)


def test_of_two_spellings_of_rope_the_hubs_decides_as_in_transformers():
    other = {"mrope_section": [32, 16, 16], "rope_theta": 1e4, "rope_type": "default"}
    text = HUB_4B["text_config"] | {"rope_parameters": other}
    assert parse_config(HUB_4B | {"text_config": text}) == parse_config(HUB_4B)


def test_the_rope_of_the_tower_that_transformers_5_writes_is_read():
    rope = {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "axial"}}
    tower = HUB_4B["vision_config"] | rope
    assert parse_config(HUB_4B | {"vision_config": tower}) == parse_config(HUB_4B)


def test_of_two_fields_about_the_head_the_outer_one_decides_as_in_transformers():
    for outer, inner, tied in ((False, True, False), (True, False, True), (None, True, True)):
        text = HUB_4B["text_config"] | {"tie_word_embeddings": inner}
        data = HUB_4B | {"text_config": text, "tie_word_embeddings": outer}
        assert parse_config(data).shapes.tie_word_embeddings is tied


def test_round_trip_through_json():
    untied = tiny.make_policy("qwen3_vl", tie_word_embeddings=False).shapes
    for shapes in (Qwen3VLShapes.from_hf(HUB_4B), untied):
        assert Qwen3VLShapes.from_hf(json.loads(json.dumps(shapes.to_hf()))) == shapes


def test_every_third_frequency_follows_height_and_every_third_width():
    axes = published("Qwen/Qwen3-VL-2B-Instruct").shapes.decoder.rope_axes
    assert axes == (0, 1, 2) * 20 + (0,) * 4
    assert [axes.count(axis) for axis in range(3)] == [24, 20, 20]


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", {"hidden_act": "gelu"}, "hidden_act"),
        ("text_config", {"attention_bias": True}, "attention_bias"),
        ("text_config", {"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        (
            "text_config",
            {"rope_scaling": {"mrope_section": [24, 20, 20], "mrope_interleaved": False}},
            "mrope_interleaved",
        ),
        ("text_config", {"rope_scaling": {"mrope_section": [16, 24, 24]}}, "every third"),
        ("text_config", {"head_dim": None}, "no head_dim"),
        ("text_config", {"num_hidden_layers": 2}, "num_hidden_layers=2"),
        ("text_config", {"num_attention_heads": "32"}, "num_attention_heads='32' must be a"),
        ("text_config", {"rope_theta": -1}, "rope_theta=-1.0 must be a finite number over 0"),
        ("text_config", {"rope_theta": "5e6"}, "rope_theta='5e6' must be a finite number over 0"),
        ("text_config", {"rms_norm_eps": 10**400}, "rms_norm_eps=1000+ must be a finite number"),
        ("text_config", {"num_key_value_heads": 0}, "num_key_value_heads=0 must be a whole number"),
        (
            "text_config",
            {"num_key_value_heads": 5},
            "must be a multiple of num_key_value_heads",
        ),
        ("text_config", {"rope_scaling": [1]}, r"rope_scaling='\[1\]', which must be an object"),
        ("text_config", {"rope_scaling": {"mrope_section": 64}}, "mrope_section='64'.* a list"),
        (
            "text_config",
            {"vocab_size": 100},
            "image_token_id=151655, which must be under vocab_size=100",
        ),
        ("text_config", {"quantization_config": {"quant_method": "awq"}}, r"config \(awq\)"),
        ("vision_config", {"num_heads": 0}, "vision num_heads=0 must be a whole number"),
        ("vision_config", {"in_channels": 4}, "in_channels"),
        ("vision_config", {"hidden_act": "silu"}, "vision hidden_act"),
        ("vision_config", {"num_position_embeddings": 2000}, "must be a square"),
        ("vision_config", {"deepstack_visual_indexes": [5, 24]}, "depth - 1 = 23"),
        ("vision_config", {"deepstack_visual_indexes": [11, 5]}, "must rise"),
        ("vision_config", {"deepstack_visual_indexes": 5}, "deepstack_visual_indexes='5'.* a list"),
        ("vision_config", {"rope_parameters": {"rope_theta": 5e4}}, "vision rope_theta"),
        ("vision_config", {"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ("vision_config", {"quantization_config": {"quant_method": "fp8"}}, r"config \(fp8\)"),
        ("vision_config", {"spatial_merge_size": 3}, "must divide 64"),
        ("vision_config", {"out_hidden_size": 99}, "=99"),
    ],
)
def test_what_cannot_run_is_refused_by_name(part, changes, message):
    with pytest.raises(ShapesError, match=message):
        parse_config(HUB_4B | {part: HUB_4B[part] | changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_vl_moe"}, r"'qwen3_vl_moe' \(Qwen3-VL-MoE\), which is not supp"),
        ({"model_type": "qwen3_5"}, r"Qwen3\.5\), which is not supported yet"),
        ({"model_type": "qwen3_omni_moe"}, r"Qwen3-Omni\), which is not supported yet"),
        ({"model_type": "mllama"}, "not known; only 'qwen2_5_vl', 'qwen3_vl' policies"),
        ({"model_type": "qwen3_omni_moe_thinker"}, r"\(Qwen3-Omni\), which is not supported yet"),
        (
            {"model_type": "qwen3_omni_moe_talker_text"},
            r"\(Qwen3-Omni\), which is not supported yet",
        ),
        ({"model_type": "qwen3_5_moe_text"}, r"\(Qwen3\.5-MoE\), which is not supported yet"),
        (
            {"model_type": "qwen3_vl_text"},
            "is only a part of a policy: give the folder",
        ),
        ({"model_type": ["qwen3_vl"]}, "not known"),
        ({"model_type": None}, "model_type=None, which is not known"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\)"),
        ({"quantization_config": "fp8"}, r"quantization_config \(fp8\)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"quantization \(4 bits\)"),
        ({"image_token_id": "151655"}, "image_token_id='151655' must be a whole number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes', which must be true or false"),
        ({"text_config": []}, r"text_config=\[\], which must be an object"),
        ({"vision_config": None}, "the file has no vision_config"),
    ],
)
def test_families_and_formats_that_cannot_run_are_refused_by_name(changes, message):
    with pytest.raises(ShapesError, match=message):
        parse_config(HUB_4B | changes)
