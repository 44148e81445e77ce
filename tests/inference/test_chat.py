"""Requests of chat completions: what is read of them, what is refused, and the prompt they make."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from support import tiny
from transformers import PreTrainedTokenizerBase

from emor3_jax.embedded.tokenizer import special_ids, train_tokenizer
from emor3_jax.errors import UserError
from emor3_jax.inference.chat import (
    ChatError,
    ChatRequest,
    Choice,
    completion,
    encode_chat,
    parse_request,
    stream_events,
)
from emor3_jax.models import pack
from emor3_jax.models.processor import ImageSettings, Processor
from emor3_jax.rollout.sampling import Sampling


def png(width: int = 16, height: int = 16) -> bytes:
    out = io.BytesIO()
    Image.fromarray(
        np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)
    ).save(out, "PNG")
    return out.getvalue()


def image_part(image: bytes, kind: str = "png") -> dict:
    url = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


def test_a_request_is_read():
    data = {
        "model": "m",
        "messages": [
            {"role": "developer", "content": "be brief"},
            user(image_part(b"abc"), text_part("which ?")),
        ],
        "max_completion_tokens": 7,
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": -1,
        "stop": ["\n", ""],
        "stream": True,
        "user": "ignored: it changes no answer",
    }
    found = parse_request(data, 64, None)
    assert found.images == [b"abc"] and found.last_text == "which ?"
    assert [turn["role"] for turn in found.turns] == ["system", "user"]
    assert found.turns[1]["content"] == [{"type": "image"}, text_part("which ?")]
    assert found.sampling == Sampling(7, 0.5, 0.9, ())
    assert (found.choices, found.seed, found.stop) == (2, 2**32 - 1, ("\n",))
    assert found.stream and not found.stream_usage
    plain = parse_request({"model": "m", "messages": [user(text_part("a"))]}, 64, None)
    assert plain.sampling == Sampling(64, 0.0, 1.0, ())
    # More than the policy's own limit is that limit.
    more = {"model": "m", "messages": [user(text_part("a"))], "max_tokens": 9999}
    assert parse_request(more, 64, None).sampling.max_tokens == 64


GOOD = {"model": "m", "messages": [user(text_part("a"))]}


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"model": None}, "model", "model must be a text"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": ["a"]}, "messages", r"messages\[0\] must be an object"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages", "role='tool'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "a text or a list of parts"),
        ({"messages": [user({"type": "video"})]}, "messages", "not 'video'"),
        ({"messages": [user("a")]}, "messages", "not None"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "must be the user's"),
        ({"messages": [user({"type": "image_url"})]}, "messages", "url must be a text"),
        (
            {"messages": [user({"type": "image_url", "image_url": "http://a/b.png"})]},
            "messages",
            "is not fetched; send the image itself",
        ),
        (
            {"messages": [user({"type": "image_url", "image_url": "data:image/png;base64,a?"})]},
            "messages",
            "no base64",
        ),
        ({"messages": [user(*[image_part(b"a")] * 17)]}, "messages", "more than 16 images"),
        ({"n": 17}, "n", "n=17: must be a whole number from 1 to 16"),
        ({"n": True}, "n", "n=True"),
        ({"temperature": 3}, "temperature", "from 0 to 2"),
        ({"temperature": "0"}, "temperature", "must be a number"),
        ({"top_p": 0}, "top_p", "top_p=0"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens=0: .* from 1 to 2147483648"),
        ({"max_tokens": 1.5}, "max_tokens", "a whole number"),
        ({"stop": 3}, "stop", "a text or at most 16"),
        ({"stop": {}}, "stop", "a text or at most 16"),
        ({"stream": "yes"}, "stream", "stream='yes': must be true or false"),
        ({"stream": 1}, "stream", "stream=1"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_its_field(change, param, message):
    with pytest.raises(ChatError, match=message) as raised:
        parse_request(GOOD | change, 64, None)
    assert raised.value.param == param and raised.value.status == 400


def test_a_data_url_is_spelt_in_any_case():
    asked = {"messages": [user({"type": "image_url", "image_url": "DATA:image/PNG;Base64,YWJj"})]}
    assert parse_request(GOOD | asked, 64, None).images == [b"abc"]


def test_an_address_is_fetched_where_that_is_allowed():
    asked = {"messages": [user({"type": "image_url", "image_url": {"url": "http://a/b.png"}})]}
    assert parse_request(GOOD | asked, 64, lambda url: url.encode()).images == [b"http://a/b.png"]


@pytest.fixture(scope="module")
def processor() -> Processor:
    tokenizer: PreTrainedTokenizerBase = train_tokenizer(["which emotion is this ?"], 300)
    policy = tiny.make_policy(vocab_size=len(tokenizer), **special_ids(tokenizer))
    images = ImageSettings(64, 4096, patch_size=4)
    return Processor(tokenizer, images, policy.layout)


def test_a_chat_of_two_images_is_laid_out_as_by_pack(processor):
    turns = [
        {"role": "user", "content": [{"type": "image"}, text_part("which ?")]},
        {"role": "assistant", "content": [text_part("this")]},
        {"role": "user", "content": [text_part("and"), {"type": "image"}]},
    ]
    given = [png(16, 24), png(32, 16)]
    batch = encode_chat(processor, turns, given, 400)
    n = int(batch.prompt.mask.sum())
    ids = np.append(batch.prompt.tokens[0, :n], batch.last_token)
    image_id = processor.layout.shapes.image_token_id
    # 2 x 3 and 4 x 2 tokens of 8 x 8 pixels.
    assert (ids == image_id).sum() == 14
    text = processor.tokenizer.decode(ids[ids != image_id])
    assert text.index("which ?") < text.index("this") < text.index("and")
    patches, grids = zip(*map(processor.patches, given), strict=True)
    policy = tiny.make_policy(vocab_size=300, **special_ids(processor.tokenizer))
    prompt, images, following = pack(
        policy, ids[None], np.ones((1, len(ids)), int), np.concatenate(patches), np.asarray(grids)
    )
    np.testing.assert_array_equal(batch.prompt.positions[0, :n], prompt.positions[0, :n])
    assert batch.next_position[0] == prompt.positions[0, -1, 0] == following[0] - 1
    # The same features behind each token: windows are padded to other numbers.
    windows = batch.images.mask.shape[2], images.mask.shape[2]
    per_window = processor.layout.slots(1)

    def places(slots: np.ndarray, count: int) -> list[tuple[int, int]]:
        return [divmod(int(x), count * per_window) for x in slots if x >= 0]

    assert places(batch.prompt.image_slots[0], windows[0]) == places(
        prompt.image_slots[0], windows[1]
    )
    assert batch.images.patches.shape[:2] == (1, 2)


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        ([text_part("<|im_start|>system")], [], "contains the special token <|im_start|>"),
        ([text_part("<|image_pad|>")], [], "contains the special token <|image_pad|>"),
        ([{"type": "image"}], [b"no image"], "cannot decode an image of 8 bytes"),
        ([{"type": "image"}], [png(64, 64)], "over the 40 that leave room for the response"),
    ],
)
def test_what_is_no_prompt_is_named(processor, turns, images, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        encode_chat(processor, [{"role": "user", "content": turns}], images, 40)


def test_a_chat_without_an_image(processor):
    batch = encode_chat(processor, [{"role": "user", "content": [text_part("a")]}], [], 400)
    assert batch.images is None and (batch.prompt.image_slots == -1).all()


def test_a_stream_says_what_the_whole_answer_says():
    request = ChatRequest("m", [], [], Sampling(4, 0.0, 1.0, ()), choices=2)
    body = completion(request, [Choice("joy", 2, True), Choice("fe", 4, False)], 10)
    assert [x["finish_reason"] for x in body["choices"]] == ["stop", "length"]
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 6, "total_tokens": 16}
    *events, last = stream_events(body, with_usage=True)
    said = ["", ""]
    for event in events:
        (choice,) = event["choices"]
        said[choice["index"]] += choice["delta"].get("content", "")
    assert said == ["joy", "fe"] and last["usage"]["total_tokens"] == 16
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
