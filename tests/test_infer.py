"""What `infer` is asked for is checked before it computes; its errors are one line."""

import io
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support import tiny

from emor3_jax import infer
from emor3_jax.embedded.tokenizer import special_ids, train_tokenizer
from emor3_jax.errors import UserError
from emor3_jax.infer import MAX_PIXELS, answer, with_pixel_cap
from emor3_jax.models import LoadedPolicy
from emor3_jax.models.processor import ImageSettings, Processor


@pytest.fixture(scope="module")
def policy():
    tokenizer = train_tokenizer(["which emotion is this ?"], 300)
    policy = tiny.make_policy(vocab_size=len(tokenizer), **special_ids(tokenizer))
    # As the hub's Qwen2.5-VL, of which a photograph of 12 megapixels has 15,552 tokens.
    images = ImageSettings(min_pixels=3136, max_pixels=12_845_056)
    return LoadedPolicy(policy, {}, Processor(tokenizer, images, policy.layout))


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, r"max_tokens=0: must be 1 to 512"),
        ({"max_tokens": 10**9}, r"max_tokens=1000000000: must be 1 to 512"),
        ({"temperature": -0.1}, r"temperature=-0.1: must be 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, r"temperature=nan: must be 0"),
        ({"temperature": float("inf")}, r"temperature=inf: must be 0"),
        ({"question": " \n"}, r"question='': is empty"),
        ({"question": "caf\udce9 ?"}, r"question='caf.udce9 \?': is no text in UTF-8"),
        ({"question": "<|image_pad|>"}, r"special token"),
        ({"image": b""}, r"an image of 0 bytes: it is empty"),
        ({"image": b"%!PS-Adobe-3.0 EPSF-3.0"}, r"it is an EPS or PostScript file; images are"),
        ({"image": b"\0\0\0\x18ftypheic" + bytes(12)}, r"it is a HEIC image .* save it as JPEG"),
        ({"templates": "/dev/zero"}, r"template set='/dev/zero': no such file"),
        ({"labels": ("joy", "Joy")}, r"equal but for case"),
        ({"labels": ("joy", "caf\udce9")}, r"label 'caf.udce9' is no text in UTF-8"),
    ],
)
def test_a_wrong_value_is_named_before_anything_is_computed(policy, changes, message):
    given = {"image": png(), "question": "why ?", "labels": ("joy", "fear"), "templates": "tiny"}
    given |= changes
    with pytest.raises(UserError, match=message) as raised:
        answer(policy, given.pop("image"), **given)
    assert "\n" not in str(raised.value)


def test_a_photograph_is_scaled_to_a_cap(policy):
    tokens = {
        most: with_pixel_cap(policy, most).processor.read_sizes(3000, 4000)[1]
        for most in (0, MAX_PIXELS, 10**9)
    }
    assert tokens[0] == tokens[10**9] == 107 * 143 and tokens[MAX_PIXELS] <= 1280
    assert with_pixel_cap(policy, 1000).processor.images.min_pixels == 1000
    with pytest.raises(UserError, match="max_pixels=-1: must be 0"):
        with_pixel_cap(policy, -1)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("/dev/zero", "/dev/zero is a pipe, a socket or a device, not a file"),
        ("gone.png", "gone.png cannot be read: No such file or directory"),
        ("/", "/ is a folder, not a file"),
        ("n\0l", "n\\x00l holds a NUL, which no name of a file does"),
    ],
)
def test_the_program_ends_with_one_line(monkeypatch, capsys, image, message):
    monkeypatch.setattr(infer, "FLAGS", SimpleNamespace(image=image))
    monkeypatch.setattr(infer, "set_flags", lambda platform: None)
    logger = logging.getLogger("emor3_jax")
    level = logger.level
    try:
        with pytest.raises(SystemExit) as ended:
            infer.main([])
    finally:
        logger.setLevel(level)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"
