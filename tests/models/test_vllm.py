"""What vLLM needs of a policy's folder: both families pass as exported, a broken rule is told."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny_run import small_policy

from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.errors import UserError
from emor3_jax.models import LoadedPolicy, published, save, vllm
from emor3_jax.models.processor import ImageSettings, Processor

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm")
    tokenizer = train_tokenizer(["which emotion is this ?"], 300)
    for family in FAMILIES:
        policy = small_policy(tokenizer, family)
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), policy.param_shapes())
        processor = Processor(tokenizer, ImageSettings(), policy.layout)
        save(LoadedPolicy(policy, params, processor), root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="module")
def files(exported):
    return {family: vllm.read_files(folder) for family, folder in exported.items()}


def problems(files: vllm.VllmFiles, cut: int = 1) -> list[str]:
    return [str(problem) for problem in vllm.find_problems(files, cut)]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_folder_breaks_no_rule(exported, family):
    assert vllm.advice(exported[family]) == []


CONFIG = [
    ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "architectures=['Qwen2VL"),
    ({"architectures": None}, "architectures=None: must be ['Qwen"),
    ({"torch_dtype": "int8"}, "dtype='int8': must be float32 (served in bfloat16)"),
    ({"dtype": "float64"}, "dtype='float64'"),
    ({"image_token_id": 7}, "image_token_id=7: must be the id of <|image_pad|> in tokenizer.json,"),
    ({"vision_start_token_id": 7}, "vision_start_token_id=7: must be the id of <|vision_start|>"),
    ({"model_type": "qwen2_vl"}, "model_type='qwen2_vl': must be 'qwen2_5_vl' or 'qwen3_vl'"),
    ({"model_type": None}, "model_type=None"),
    ({"vision_config": 3}, "config.json='"),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("change", "told"), CONFIG)
def test_fields_of_the_config(files, family, change, told):
    (found,) = problems(files[family]._replace(config=files[family].config | change))
    assert told in found


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_three_axes_must_be_said(files, family):
    config = dict(files[family].config)
    text = dict(config.get("text_config", config))
    del text["rope_scaling"]
    config = config | {"text_config": text} if "text_config" in config else text
    assert "rope_scaling has no mrope_section" in problems(files[family]._replace(config=config))[0]


def test_heads_that_have_no_kernel(files):
    tower = files["qwen2_5_vl"].config["vision_config"] | {"num_heads": 8}
    config = files["qwen2_5_vl"].config | {"vision_config": tower}
    (found,) = problems(files["qwen2_5_vl"]._replace(config=config))
    assert "num_heads=4.0: must be a multiple of 8 up to 256" in found


def test_sizes_that_devices_cannot_share(files):
    # 2 heads of 1 key head, and a tower of 1 head: by hand.
    assert problems(files["qwen3_vl"], 2) == [
        "config.json: vision_config.num_heads=1: must be divided by the tensor parallel size, 2"
    ]
    names = [problem.field for problem in vllm.find_problems(files["qwen3_vl"], 3)]
    # A key head goes to three devices; 2 heads, 64 columns and 320 padded tokens do not divide.
    assert "config.json: num_key_value_heads" not in names and len(names) == 6
    assert names[0].endswith("num_attention_heads") and names[-1].endswith("vocab_size, padded")
    # 16 heads, 2 key heads; the tower has 3420 columns between its layers, 4 times 855.
    assert vllm.parallel_sizes(published("Qwen/Qwen2.5-VL-3B-Instruct")) == [1, 2, 4]
    # 28 heads and 4 key heads.
    assert vllm.parallel_sizes(published("Qwen/Qwen2.5-VL-7B-Instruct")) == [1, 2, 4]
    # 32 heads and 8 key heads; the tower 16 heads and 4304 columns, 16 times 269.
    assert vllm.parallel_sizes(published("Qwen/Qwen3-VL-4B-Instruct")) == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_tensors(files, family):
    found = files[family]
    (file,) = found.tensors
    names = found.tensors[file]

    def told(*names: str) -> list[str]:
        return problems(found._replace(tensors={file: names}))

    first, *rest = sorted(names)
    (missing,) = told(*rest)
    assert f"{vllm._renamed(first, vllm._EXPECTED[family].prefixes)!r}: is missing" in missing
    (extra,) = told(*names, "model.visual.extra.weight")
    assert "'model.visual.extra.weight': has no place" in extra
    # A head that is tied is left out by vLLM.
    assert told(*names, "lm_head.weight") == []
    untied = found.config | {"tie_word_embeddings": False}
    if "text_config" in untied:
        untied["text_config"] = untied["text_config"] | {"tie_word_embeddings": False}
    (missing,) = problems(found._replace(config=untied))
    assert "'language_model.lm_head.weight': is missing" in missing
    unknown = [f"base_model.{name}" for name in names]
    lines = told(*unknown)
    assert "base_model." in lines[0] and f"(and {len(names) - 1} more)" in lines[0]
    assert "is missing" in lines[1]


def test_both_schemes_of_names_are_those_of_vllm(files):
    found = files["qwen2_5_vl"]
    (file,) = found.tensors
    newer = tuple(
        f"model.{name}"
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.")
        for name in found.tensors[file]
    )
    assert problems(found._replace(tensors={file: tuple(newer)})) == []
    # Those of Qwen3-VL have one scheme: without `language_model` a tensor has no place.
    found = files["qwen3_vl"]
    older = tuple(
        name.replace("language_model.", "") for name in next(iter(found.tensors.values()))
    )
    assert "has no place" in problems(found._replace(tensors={file: older}))[0]


def test_files_of_weights(exported, files, tmp_path):
    found = files["qwen2_5_vl"]
    (file,) = found.tensors
    assert "must be there; vLLM reads each" in problems(found._replace(tensors={}))[0]
    stray = {**found.tensors, "adapter_model.safetensors": ("lora_A",)}
    (told,) = problems(found._replace(tensors=stray))
    assert "'lora_A': has no place in vLLM's model: every *.safetensors" in told
    assert problems(found._replace(tensors=stray, indexed=frozenset([file]))) == []
    (told,) = problems(found._replace(indexed=frozenset([file, "model-2.safetensors"])))
    assert told.startswith("model.safetensors.index.json='model-2.safetensors': is not there")
    shutil.copytree(exported["qwen2_5_vl"], tmp_path / "stray")
    save_file({"x": np.zeros(1)}, tmp_path / "stray" / "other.safetensors")
    assert ["'x': has no place" in line for line in vllm.advice(tmp_path / "stray")] == [True]
    tensors = load_file(tmp_path / "stray" / file)
    assert set(tensors) == set(found.tensors[file])
    (tmp_path / "stray" / file).write_bytes(b"x")
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        vllm.read_files(tmp_path / "stray")


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_of_images_inside_of_a_processor_file(exported, family, tmp_path):
    """As transformers 5 writes them; `push` uploads any folder."""
    folder = tmp_path / family
    shutil.copytree(exported[family], folder)
    images = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    for kind, problems in (("Qwen2VLImageProcessor", 0), ("CLIPImageProcessor", 1)):
        inner = images | {"image_processor_type": kind}
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
        told = vllm.advice(folder)
        assert len(told) == problems
        assert all("processor_config.json: image_processor_type='CLIP" in line for line in told)


def test_processor_and_tokenizer(files):
    found = files["qwen3_vl"]

    def told(**changes: object) -> str:
        (line,) = problems(found._replace(**changes))
        return line

    images = found.preprocessor | {"image_processor_type": "Qwen2_5_VLImageProcessor"}
    assert "'Qwen2_5_VLImageProcessor': must be Qwen2VLImageProcessor" in told(preprocessor=images)
    assert "image_processor_type=None" in told(preprocessor={})
    whole = found.preprocessor | {"processor_class": "Qwen2_5_VLProcessor"}
    assert "must be Qwen3VLProcessor, or missing" in told(preprocessor=whole)
    assert "must hold <|vision_start|><|image_pad|><|vision_end|>" in told(template="{{ x }}")
    silent = found.tokenizer | {"eos_token": None}
    assert "eos_token=None: must be the end of a turn" in told(tokenizer=silent)
    assert problems(found._replace(tokenizer=silent, generation={"eos_token_id": [3]})) == []


def test_templates_of_older_folders_are_read(exported, tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(exported["qwen2_5_vl"], folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    assert "chat template=''" in vllm.advice(folder)[0]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert vllm.advice(folder) == []
