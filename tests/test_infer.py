"""`infer`: what it is asked for is checked before it computes, a policy is found by any of its
names, and three lines of Python do what the program does."""

import base64
import io
import json
import logging
import re
from types import SimpleNamespace

import pytest
from PIL import Image
from support import tiny
from support.tiny_run import write_policy

from emor3_jax import infer, models
from emor3_jax.data.inference_settings import InferenceSettings
from emor3_jax.embedded.tokenizer import special_ids, train_tokenizer
from emor3_jax.errors import UserError
from emor3_jax.infer import InferenceOptions, Prediction, answer
from emor3_jax.inference.chat import parse_request, respond
from emor3_jax.inference.predictor import MAX_PIXELS, find_steps, round_up, with_pixel_cap
from emor3_jax.models import LoadedPolicy
from emor3_jax.models.processor import ImageSettings, Processor

LABELS = ("joy", "fear", "sadness")


@pytest.fixture(scope="module")
def policy():
    tokenizer = train_tokenizer(["which emotion is this ?"], 300)
    policy = tiny.make_policy(vocab_size=len(tokenizer), **special_ids(tokenizer))
    # As the hub's Qwen2.5-VL, of which a photograph of 12 megapixels has 15,552 tokens.
    images = ImageSettings(min_pixels=3136, max_pixels=12_845_056)
    return LoadedPolicy(policy, {}, Processor(tokenizer, images, policy.layout))


def png(colour: tuple[int, int, int] = (0, 0, 0)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, r"max_tokens=0: must be 1 to "),
        ({"max_tokens": 513}, r"max_tokens=513: must be 1 to 512"),
        ({"temperature": -0.1}, r"temperature=-0.1: must be 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, r"temperature=nan: must be 0"),
        ({"temperature": float("inf")}, r"temperature=inf: must be 0"),
        ({"max_pixels": -1}, r"max_pixels=-1: must be 0"),
        ({"batch_size": 0}, r"batch_size=0: must be 1"),
        ({"dtype": "int8"}, r"dtype='int8': must be float32 or bfloat16"),
        ({"question": " \n"}, r"question='': is empty"),
        ({"question": "caf\udce9 ?"}, r"question='caf.udce9 \?': is no text in UTF-8"),
        ({"question": "<|image_pad|>"}, r"special token"),
        ({"question": "why ? " * 200}, r"prompt has \d+ tokens, over the 448 that leave room"),
        ({"image": b""}, r"an image of 0 bytes: it is empty"),
        ({"image": b"%!PS-Adobe-3.0 EPSF-3.0"}, r"it is an EPS or PostScript file; images are"),
        ({"image": b"\0\0\0\x18ftypheic" + bytes(12)}, r"it is a HEIC image .* save it as JPEG"),
        ({"image": "gone.png"}, r"gone.png cannot be read: No such file"),
        ({"image": "ftp://localhost/a.png"}, r"only addresses of http:// and https://"),
        ({"image": 3}, r"an image of type int: give a path"),
        ({"templates": "/dev/zero"}, r"template set='/dev/zero': no such file"),
        ({"labels": ("joy", "Joy")}, r"equal but for case"),
        ({"labels": "mikels9"}, r"labels='mikels9' is no label set; .*nearest: mikels8"),
        ({"labels": ("joy", "caf\udce9")}, r"label 'caf.udce9' is no text in UTF-8"),
    ],
)
def test_a_wrong_value_is_named_before_anything_is_computed(policy, changes, message):
    given = {"image": png(), "question": "why ?", "labels": ("joy", "fear"), "templates": "tiny"}
    given |= {"max_tokens": 64} | changes
    names = InferenceOptions.__dataclass_fields__.keys() & given.keys()
    with pytest.raises(UserError, match=message) as raised:
        options = InferenceOptions(**{name: given.pop(name) for name in names})
        answer(policy, given.pop("image"), options=options, **given)
    assert "\n" not in str(raised.value)


def test_an_image_token_of_another_policy_is_named(policy):
    other = tiny.make_policy("qwen3_vl", vocab_size=policy.shapes.vocab_size, image_token_id=5)
    settings = ImageSettings(64, 4096, patch_size=4)
    processor = Processor(policy.processor.tokenizer, settings, other.layout)
    loaded = LoadedPolicy(other, {}, processor)
    with pytest.raises(UserError, match=r"id of <\|image_pad\|>: .* the policy's config\.json 5;"):
        answer(loaded, png(), question="why ?", labels=LABELS, templates="tiny", max_tokens=4)


def test_a_photograph_is_scaled_to_a_cap(policy):
    tokens = {
        most: with_pixel_cap(policy, most).processor.read_sizes(3000, 4000)[1]
        for most in (0, MAX_PIXELS, 10**9)
    }
    assert tokens[0] == tokens[10**9] == 107 * 143 and tokens[MAX_PIXELS] <= 1280
    assert with_pixel_cap(policy, 1000).processor.images.min_pixels == 1000


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("/dev/zero", "/dev/zero is a pipe, a socket or a device, not a file"),
        ("gone.png", "gone.png cannot be read: No such file or directory"),
        ("n\0l", "n\\x00l holds a NUL, which no name of a file does"),
        (None, "give images to ask somewhere about: emor3 infer POLICY IMAGE…"),
    ],
)
def test_the_program_ends_with_one_line(monkeypatch, capsys, image, message):
    flags = SimpleNamespace(policy="somewhere", image=image and [image])
    assert run_main(monkeypatch, flags) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"


def run_main(monkeypatch, flags, *arguments: str) -> int:
    """Runs the program with these flags; returns its exit status."""
    monkeypatch.setattr(infer, "FLAGS", flags)
    monkeypatch.setattr(infer, "set_flags", lambda platform: None)
    loggers = [logging.getLogger(name) for name in ("emor3_jax", "absl")]
    levels = [logger.level for logger in loggers]
    try:
        infer.main(["infer", *arguments])
    except SystemExit as ended:
        return ended.code
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random policy that was trained on three labels, and images."""
    folder = tmp_path_factory.mktemp("infer")
    write_policy(folder / "policy")
    settings = InferenceSettings().changed(
        labels=LABELS, question="which emotion ?", template="tiny", max_tokens=8
    )
    settings.write(folder / "policy")
    (folder / "images" / "within").mkdir(parents=True)
    (folder / "images" / "b.png").write_bytes(png((200, 30, 30)))
    (folder / "images" / "a.txt").write_text("no image")
    (folder / "images" / "within" / "c.png").write_bytes(png((30, 30, 200)))
    (folder / "images" / "within" / "bad.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def predictor(folder):
    return infer.load(folder / "policy", options=InferenceOptions(batch_size=2))


def test_labels_question_and_templates_are_those_of_the_folder(predictor):
    assert predictor.settings.labels == LABELS
    assert predictor.settings.prompt.startswith("which emotion ? joy, fear, sadness\n<step1> seen")


def test_three_lines_of_python(predictor, folder, monkeypatch):
    found = predictor.predict(folder / "images" / "b.png")
    assert isinstance(found, Prediction) and found.image.endswith("b.png")
    assert list(found.probabilities) == list(LABELS)
    assert sum(found.probabilities.values()) == pytest.approx(1, abs=1e-5)
    # Of a text, and without building the tables of the labels once more.
    monkeypatch.setattr(infer, "Predictor", lambda policy, settings, options: predictor)
    same = answer(models.load(str(folder / "policy")), str(folder / "images" / "b.png"))
    assert same.response == found.response and same.label == found.label
    assert same.probabilities == pytest.approx(found.probabilities, abs=1e-4)


def test_the_images_of_a_folder_are_asked_about_in_batches(predictor, folder):
    found = predictor.predict_all(folder / "images")
    assert [each.image.rsplit("/", 1)[1] for each in found] == ["b.png", "bad.png", "c.png"]
    assert found[1].error.startswith("cannot decode an image of 8 bytes") and not found[1].response
    alone = predictor.predict(png((200, 30, 30)))
    assert found[0].probabilities == pytest.approx(alone.probabilities, abs=1e-4)
    (empty,) = predictor.predict_all([str(folder / "policy")])
    assert "there is no image in this folder" in empty.error


def test_a_chat_with_the_same_prompt_has_the_same_response(predictor):
    image = png((200, 30, 30))
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": predictor.settings.prompt},
    ]
    data = {"model": "emor3", "messages": [{"role": "user", "content": content}], "n": 2}
    choices, tokens = respond(predictor, parse_request(data, 8, None))
    assert [choice.text for choice in choices] == [predictor.predict(image).response] * 2
    assert choices[0].tokens <= 8 and tokens > 30


def test_the_program_writes_json_lines(predictor, folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(infer, "load", lambda name, **_: predictor)
    out = tmp_path / "new" / "out.jsonl"
    given = {"policy": None, "image": None, "format": "jsonl", "out": str(out)}
    given |= dict.fromkeys(("labels", "question", "template", "max_tokens"))
    given |= dict(zip(("batch", "temperature", "seed", "dtype"), (1, 0.0, 0, ""), strict=True))
    given |= {"max_pixels": 0, "reflect": True, "probabilities": True}
    flags = SimpleNamespace(**given)
    assert run_main(monkeypatch, flags, "policy", str(folder / "images"), "gone.png") == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [sorted(row)[:2] for row in rows[1:]] == [
        ["error", "image"],
        *[["coherence", "complete"]],
        ["error", "image"],
    ]
    assert capsys.readouterr().err.splitlines()[-1] == "2 of 4 images could not be used"
    assert run_main(monkeypatch, flags, "policy", "gone.png", "caf\udce9.png") == 2
    assert json.loads(out.read_text().splitlines()[1])["image"] == "caf\udce9.png"
    assert "gone.png: " in capsys.readouterr().err
    # On a terminal that shows the rows, what is wrong with an image is not said once more.
    flags.out = ""
    for stream in (infer.sys.stdout, infer.sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    run_main(monkeypatch, flags, "policy", "gone.png", "lost.png")
    printed = capsys.readouterr()
    assert "gone.png" in printed.out and "gone.png" not in printed.err


@pytest.mark.parametrize("name", ["images", "gone", "gs://box/policy"])
def test_what_is_no_policy_is_named(folder, name):
    with pytest.raises((UserError, FileNotFoundError), match=re.escape(str(name))):
        infer.load(folder / name if "://" not in name else name)


def test_a_policy_prints_without_its_weights(predictor):
    shown = repr(predictor.policy)
    assert re.fullmatch(
        r"<LoadedPolicy qwen2_5_vl: [\d,]+ parameters \(float32\) from '.*'>", shown
    )
    assert "array" not in repr([predictor.policy])


@pytest.mark.parametrize(
    ("response", "steps"),
    [
        (
            "<step1> a </step1>\n<step2> b\nc </step2> <step3>d</step3> \\boxed{joy}",
            ("a", "b\nc", "d"),
        ),
        ("<step1> cut <step2> b \\boxed{joy}", ("cut", "b")),
        ("no steps", ()),
        ("<step1> to the end", ("to the end",)),
    ],
)
def test_steps_are_found(response, steps):
    assert find_steps(response) == steps


def test_the_trust_score_is_the_mean_of_both_reflections():
    assert Prediction(coherence=0.5, consistency=1.0).trust == 0.75
    assert Prediction(coherence=0.5).trust is None


def test_few_sizes_are_compiled():
    assert [round_up(n) for n in (0, 1, 8, 9, 16, 17, 100, 1025)] == [
        1,
        1,
        8,
        10,
        16,
        20,
        112,
        1280,
    ]
    assert len({round_up(n) for n in range(1, 4097)}) < 60
    assert all(n <= round_up(n) <= 1.25 * n for n in range(1, 5000))
