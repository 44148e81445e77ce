"""Whether vLLM would load a policy's folder, by the rules in its documentation and source.

vLLM itself is not run. The rules are those of 0.11 and 0.12 as far as they hold for Qwen2.5-VL and
Qwen3-VL; docs/inference.md has the table, with the file of vLLM that each is from.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from emor3_jax.files import is_file, read_json, read_text
from emor3_jax.models.errors import ShapesError, WeightsError
from emor3_jax.models.hub import parse_config
from emor3_jax.models.params import leaves
from emor3_jax.models.policy import Policy
from emor3_jax.models.processor import PREPROCESSOR_FILE
from emor3_jax.models.tokenizer import PROCESSOR_FILE
from emor3_jax.models.weights import INDEX_FILE

PARALLEL_SIZES = (1, 2, 4, 8, 16)
"""Tensor parallel sizes that `parallel_sizes` looks at."""

_PADDED_VOCABULARY = 64
_MAX_HEAD = 256
_HEAD_UNIT = 8
_IMAGE = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"


class _Expected(NamedTuple):
    """What vLLM has for a family: its architecture, processor, and renamed prefixes of tensors."""

    architecture: str
    processor: str
    prefixes: dict[str, str]


_EXPECTED = {
    "qwen2_5_vl": _Expected(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLProcessor",
        {
            "model.language_model.": "language_model.model.",
            "model.visual.": "visual.",
            "lm_head.": "language_model.lm_head.",
            "model.": "language_model.model.",
        },
    ),
    "qwen3_vl": _Expected(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLProcessor",
        {
            "model.visual.": "visual.",
            "lm_head.": "language_model.lm_head.",
            "model.language_model.": "language_model.model.",
        },
    ),
}


class VllmFiles(NamedTuple):
    """What vLLM reads of a policy's folder; a file that is not there is empty.

    Attributes:
      config: contents of `config.json`.
      preprocessor: of `preprocessor_config.json`, or the same within `processor_config.json`.
      tokenizer: of `tokenizer_config.json`.
      generation: of `generation_config.json`.
      ids: token → id, of `tokenizer.json`.
      template: the chat template.
      tensors: file → names of its tensors.
      indexed: files that `model.safetensors.index.json` names; None without it.
      settings: name of the file that `preprocessor` is from.
    """

    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    generation: Mapping[str, Any]
    ids: Mapping[str, int]
    template: str
    tensors: Mapping[str, tuple[str, ...]]
    indexed: frozenset[str] | None = None
    settings: str = PREPROCESSOR_FILE


class VllmProblem(NamedTuple):
    """A rule of vLLM that a folder breaks.

    Attributes:
      field: of a file, "file: field".
      value: of the field.
      rule: that it breaks, and the way out.
    """

    field: str
    value: object
    rule: str

    def __str__(self) -> str:
        return f"{self.field}={self.value!r}: {self.rule}"


def advice(folder: str | Path) -> list[str]:
    """Returns a line for each rule of vLLM that a folder breaks."""
    problems = find_problems(read_files(folder))
    return [f"vLLM would not load this folder: {problem}" for problem in problems]


def read_files(folder: str | Path) -> VllmFiles:
    """Reads what vLLM reads of a folder, of weights the names alone.

    Raises:
      UserError: if a file is damaged.
    """
    folder = Path(folder)

    def read(name: str) -> dict[str, Any]:
        return read_json(folder / name, ShapesError, dict) if is_file(folder / name) else {}

    tokenizer, words = read("tokenizer_config.json"), read("tokenizer.json")
    ids = {each["content"]: each["id"] for each in words.get("added_tokens", ())}
    template = tokenizer.get("chat_template") or ""
    template = read("chat_template.json").get("chat_template") or template
    if is_file(folder / "chat_template.jinja"):
        template = read_text(folder / "chat_template.jinja", ShapesError)
    index = read(INDEX_FILE)
    images = read(PROCESSOR_FILE).get("image_processor")
    is_inside = isinstance(images, dict)
    return VllmFiles(
        read("config.json"),
        images if is_inside else read(PREPROCESSOR_FILE),
        tokenizer,
        read("generation_config.json"),
        ids,
        template if isinstance(template, str) else "",
        {path.name: _names(path) for path in sorted(folder.glob("*.safetensors"))},
        frozenset(index.get("weight_map", {}).values()) if index else None,
        PROCESSOR_FILE if is_inside else PREPROCESSOR_FILE,
    )


def _names(path: Path) -> tuple[str, ...]:
    try:
        with safe_open(path, framework="numpy") as file:
            return tuple(file.keys())
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error})") from error


def find_problems(files: VllmFiles, tensor_parallel: int = 1) -> list[VllmProblem]:
    """Lists what of a folder breaks a rule of vLLM; [] if it would load.

    Args:
      files: as of `read_files`.
      tensor_parallel: `--tensor-parallel-size` of vLLM, 1 or more.
    """
    kind = files.config.get("model_type")
    expected = _EXPECTED.get(kind) if isinstance(kind, str) else None
    if expected is None:
        rule = f"must be {' or '.join(map(repr, _EXPECTED))}, of what is read here"
        return [VllmProblem("config.json: model_type", kind, rule)]
    try:
        policy = parse_config(dict(files.config))
    except ShapesError as error:
        return [VllmProblem("config.json", kind, str(error))]
    return [
        *_of_config(files.config, expected),
        *_of_sizes(policy, tensor_parallel),
        *_of_tensors(files, expected, policy),
        *_of_processor(files.preprocessor, files.settings, expected),
        *_of_tokenizer(files, policy),
    ]


def parallel_sizes(policy: Policy) -> list[int]:
    """Returns the tensor parallel sizes of `PARALLEL_SIZES` that vLLM could cut a policy by."""
    return [size for size in PARALLEL_SIZES if not list(_of_sizes(policy, size))]


def _of_config(config: Mapping[str, Any], expected: _Expected) -> Iterator[VllmProblem]:
    if config.get("architectures") != [expected.architecture]:
        rule = f"must be [{expected.architecture!r}], by which vLLM finds the model"
        yield VllmProblem("config.json: architectures", config.get("architectures"), rule)
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype not in (None, "float32", "bfloat16", "float16"):
        rule = "must be float32 (served in bfloat16), bfloat16 or float16"
        yield VllmProblem("config.json: dtype", dtype, rule)


def _of_sizes(policy: Policy, cut: int) -> Iterator[VllmProblem]:
    """Yields sizes that the attention has no kernel for, or that `cut` devices cannot share."""
    shapes, vision = policy.shapes, policy.shapes.vision
    for name, width in (
        ("head_dim", shapes.head_dim),
        ("vision_config.hidden_size / num_heads", vision.hidden_size / vision.num_heads),
    ):
        if width % _HEAD_UNIT or width > _MAX_HEAD:
            rule = f"must be a multiple of {_HEAD_UNIT} up to {_MAX_HEAD}, for FlashAttention"
            yield VllmProblem(f"config.json: {name}", width, rule)
    divided = {
        "num_attention_heads": shapes.num_heads,
        "intermediate_size": shapes.intermediate_size,
        "vision_config.num_heads": vision.num_heads,
        "vision_config.intermediate_size": vision.intermediate_size,
        "vision_config.hidden_size * spatial_merge_size**2": (
            vision.hidden_size * vision.merge_unit
        ),
        "vocab_size, padded": -(-shapes.vocab_size // _PADDED_VOCABULARY) * _PADDED_VOCABULARY,
    }
    for name, size in divided.items():
        if size % cut:
            rule = f"must be divided by the tensor parallel size, {cut}"
            yield VllmProblem(f"config.json: {name}", size, rule)
    heads = shapes.num_kv_heads
    if heads % cut and cut % heads:
        rule = f"must divide the tensor parallel size, {cut}, or be divided by it"
        yield VllmProblem("config.json: num_key_value_heads", heads, rule)


def _of_tensors(files: VllmFiles, expected: _Expected, policy: Policy) -> Iterator[VllmProblem]:
    read = {
        name: keys
        for name, keys in files.tensors.items()
        if files.indexed is None or name in files.indexed
    }
    if not read:
        rule = "must be there; vLLM reads each *.safetensors of the folder"
        yield VllmProblem("weights", sorted(files.indexed or ()), rule)
        return
    for name in sorted((files.indexed or frozenset()) - files.tensors.keys()):
        yield VllmProblem(INDEX_FILE, name, "is not there; export or download it again")
    wanted = {
        _renamed(tensor.name, expected.prefixes)
        for path, leaf in leaves(policy.param_shapes())
        for tensor in policy.family.hub_tensors(path, leaf.shape, policy.shapes)
    }
    head = "language_model.lm_head.weight"
    # vLLM leaves a head out that is the embedding.
    there = {_renamed(key, expected.prefixes): key for keys in read.values() for key in keys}
    if policy.shapes.tie_word_embeddings:
        there.pop(head, None)
    yield from _first(
        (there[name] for name in there.keys() - wanted),
        "has no place in vLLM's model: every *.safetensors of a folder without an index is read",
    )
    yield from _first(wanted - there.keys(), "is missing: vLLM starts with no tensor unset")


def _first(names: Iterable[str], rule: str) -> Iterator[VllmProblem]:
    """Yields one problem for any number of tensors."""
    names = sorted(names)
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        yield VllmProblem("tensor", names[0], rule + more)


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """Returns vLLM's name of a tensor; it applies each prefix in turn."""
    for old, new in prefixes.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def _of_processor(
    settings: Mapping[str, Any], file: str, expected: _Expected
) -> Iterator[VllmProblem]:
    kind = settings.get("image_processor_type")
    if not str(kind).startswith("Qwen2VLImageProcessor"):
        rule = "must be Qwen2VLImageProcessor, which transformers' AutoImageProcessor knows"
        yield VllmProblem(f"{file}: image_processor_type", kind, rule)
    whole = settings.get("processor_class")
    if whole not in (None, expected.processor):
        rule = f"must be {expected.processor}, or missing"
        yield VllmProblem(f"{file}: processor_class", whole, rule)


def _of_tokenizer(files: VllmFiles, policy: Policy) -> Iterator[VllmProblem]:
    ids = policy.shapes.ids_to_hf()
    fields = ("vision_start_token_id", "image_token_id", "vision_end_token_id")
    for token, field in zip(_IMAGE, fields, strict=True):
        if files.ids.get(token) != ids[field]:
            rule = f"must be the id of {token} in tokenizer.json, {files.ids.get(token)}"
            yield VllmProblem(f"config.json: {field}", ids[field], rule)
    if "".join(_IMAGE) not in files.template:
        rule = f"must hold {''.join(_IMAGE)} for an image, which vLLM replaces by its features"
        shown = files.template[:40]
        yield VllmProblem("chat template", shown, rule)
    stops = files.tokenizer.get("eos_token"), files.generation.get("eos_token_id")
    if all(stop in (None, []) for stop in stops):
        rule = "must be the end of a turn, here or in generation_config.json: else it never stops"
        yield VllmProblem("tokenizer_config.json: eos_token", None, rule)
