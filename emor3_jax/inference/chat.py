"""OpenAI's chat completions, answered by a policy: messages with images in, text out.

The fields are those of https://platform.openai.com/docs/api-reference/chat/create. The messages go
through the policy's own chat template as they are, so that a harness's prompt is what is asked.

Deviations, numbered:
 1. Where the request says no temperature, decoding is greedy; no `max_tokens` is the policy's own
    limit (`emor3.json`).
 2. What would change the answer and is not there (tools, logprobs, formats of the response,
    penalties) is refused, not ignored.
 3. A stream has one piece.
"""

import base64
import binascii
import dataclasses
import math
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from emor3_jax.data.prompts import IMAGE_TOKEN, special_token_in
from emor3_jax.errors import UserError
from emor3_jax.inference.images import MAX_FETCHED_BYTES
from emor3_jax.inference.predictor import Predictor, round_up
from emor3_jax.models.images import open_image
from emor3_jax.models.layout import Encoded
from emor3_jax.models.processor import Processor
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.types import Batch, Images, Prompt

MAX_IMAGES = 16
"""Of one request."""

MAX_CHOICES = 16
"""Responses to one request."""

_DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w=.+-]+)*;base64,", re.ASCII | re.IGNORECASE)
_NEUTRAL = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "response_format": (None, {"type": "text"}),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "top_k": (None, -1, 0),
    "min_p": (None, 0, 0.0),
}
"""Field that is not implemented → values of it that change nothing."""


class ChatError(UserError):
    """A request cannot be answered: `param` is its field, `code` OpenAI's name of the reason."""

    def __init__(self, message: str, param: str = "", code: str = "", status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """What a request asks for.

    Attributes:
      model: name of the policy.
      turns: messages as a chat template takes them, images without their bytes.
      images: encoded images, in the order of the messages.
      sampling: temperature, top-p, longest response; ids that end one are the policy's.
      choices: number of responses.
      seed: of the sampling noise.
      stop: texts before which a response is cut.
      stream: send events.
      stream_usage: the last of them says the number of tokens.
    """

    model: str
    turns: list[dict[str, Any]]
    images: list[bytes]
    sampling: Sampling
    choices: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    stream: bool = False
    stream_usage: bool = False

    @property
    def last_text(self) -> str:
        """The texts of the last message."""
        parts = self.turns[-1]["content"]
        return "\n".join(part["text"] for part in parts if part["type"] == "text").strip()


def parse_request(
    data: dict[str, Any], max_tokens: int, fetch: Callable[[str], bytes] | None
) -> ChatRequest:
    """Reads the body of a request.

    Args:
      data: the parsed body.
      max_tokens: longest response, also where the request says none.
      fetch: returns the image of an address; None refuses addresses.

    Raises:
      ChatError: naming the field that cannot be used.
    """
    for field, neutral in _NEUTRAL.items():
        if data.get(field) not in neutral:
            raise ChatError(f"{field} is not supported; leave it out", field, "unsupported_value")
    model = data.get("model")
    if not isinstance(model, str):
        raise ChatError("model must be a text; GET /v1/models lists them", "model")
    turns, images = _read_messages(data.get("messages"), fetch)
    asked = data.get("max_completion_tokens")
    name = "max_tokens" if asked is None else "max_completion_tokens"
    longest = _number(data, name, max_tokens, 1, 2**31, whole=True)
    stop = data.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(x, str) for x in stop):
        raise ChatError("stop must be a text or at most 16 of them", "stop")
    if not isinstance(data.get("stream"), bool | None):
        raise ChatError(f"stream={data['stream']!r}: must be true or false", "stream")
    options = data.get("stream_options") or {}
    return ChatRequest(
        model=model,
        turns=turns,
        images=images,
        sampling=Sampling(
            int(min(longest, max_tokens)),
            float(_number(data, "temperature", 0.0, 0, 2)),
            float(_number(data, "top_p", 1.0, 1e-6, 1)),
            (),
        ),
        choices=int(_number(data, "n", 1, 1, MAX_CHOICES, whole=True)),
        seed=int(_number(data, "seed", 0, -(2**63), 2**63 - 1, whole=True)) % 2**32,
        stop=tuple(x for x in stop if x),
        stream=data.get("stream") is True,
        stream_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


def _number(
    data: dict[str, Any], field: str, default: float, least: float, most: float, whole: bool = False
) -> float:
    value = data.get(field)
    if value is None:
        return default
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        bounds = f"{least} to {most}" if whole else f"{least:g} to {most:g}"
        raise ChatError(f"{field}={value!r}: must be {kind} from {bounds}", field)
    return value


def _read_messages(
    messages: Any, fetch: Callable[[str], bytes] | None
) -> tuple[list[dict[str, Any]], list[bytes]]:
    if not isinstance(messages, list) or not messages:
        raise ChatError("messages must be a list of at least one message", "messages")
    turns, images = [], []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise ChatError(f"{where} must be an object", "messages")
        role = {"developer": "system"}.get(message.get("role"), message.get("role"))
        if role not in ("system", "user", "assistant"):
            raise ChatError(f"{where}.role={role!r}: must be system, user or assistant", "messages")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise ChatError(f"{where}.content must be a text or a list of parts", "messages")
        turns.append({"role": role, "content": []})
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                turns[-1]["content"].append({"type": "text", "text": part["text"]})
            elif kind == "image_url":
                images.append(_read_image(part, where, fetch))
                turns[-1]["content"].append({"type": "image"})
                if len(images) > MAX_IMAGES:
                    raise ChatError(f"more than {MAX_IMAGES} images in one request", "messages")
            else:
                raise ChatError(
                    f"{where}.content: a part must be a text or an image_url, not {kind!r}",
                    "messages",
                )
    if turns[-1]["role"] != "user":
        raise ChatError("the last message must be the user's", "messages")
    return turns, images


def _read_image(part: dict[str, Any], where: str, fetch: Callable[[str], bytes] | None) -> bytes:
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise ChatError(f"{where}.content: image_url.url must be a text", "messages")
    if match := _DATA_URL.match(url):
        if (len(url) - match.end()) * 3 // 4 > MAX_FETCHED_BYTES:
            raise ChatError(f"{where}: an image of over {MAX_FETCHED_BYTES} bytes", "messages")
        try:
            return base64.b64decode(url[match.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ChatError(f"{where}: the image is no base64 ({error})", "messages") from error
    if fetch is None:
        raise ChatError(
            f"{where}: image_url={url[:60]!r} is not fetched; send the image itself, as "
            "data:image/jpeg;base64,…, or start the server with --fetch",
            "messages",
        )
    return fetch(url)


def encode_chat(
    processor: Processor, turns: Sequence[dict[str, Any]], images: Sequence[bytes], most: int
) -> Batch:
    """Returns a chat as a batch of one prompt.

    Args:
      processor: of the policy.
      turns, images: as of `ChatRequest`.
      most: tokens that the prompt may have.

    Raises:
      UserError: if a text spells a special token, an image cannot be used, or the prompt is longer.
    """
    tokenizer, layout = processor.tokenizer, processor.layout
    for turn in turns:
        for part in turn["content"]:
            if part["type"] == "text" and (found := special_token_in(tokenizer, part["text"])):
                raise ChatError(f"a message contains the special token {found}", "messages")
    encoded: list[Encoded] = []
    for image in images:
        open_image(image, processor.images.max_decoded_pixels)
        encoded.append(layout.arrange(*processor.still_patches(image)))
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # A template may raise whatever Python does where it computes.
        raise ChatError(f"the policy's chat template refuses this: {error}", "messages") from error
    pieces = text.split(IMAGE_TOKEN)
    if len(pieces) != len(encoded) + 1:
        raise ChatError("the policy's chat template does not show each image once", "messages")
    image_id, tokens = layout.shapes.image_token_id, []
    slots, bucket = [], max((each.bucket for each in encoded), default=0)
    bucket = round_up(bucket) if encoded else 0
    for i, piece in enumerate(pieces):
        # Special tokens end what is tokenised, so that pieces are as the whole.
        ids = tokenizer.encode(piece, add_special_tokens=False)
        tokens += ids
        slots += [-1] * len(ids)
        if i < len(encoded):
            tokens += [image_id] * len(encoded[i].slots)
            slots += (i * layout.slots(bucket) + encoded[i].slots).tolist()
    if len(tokens) > most:
        raise ChatError(
            f"the prompt has {len(tokens)} tokens, over the {most} that leave room for the "
            "response; send fewer or smaller images, or ask for fewer max_tokens",
            "messages",
            "context_length_exceeded",
        )
    row = np.asarray(tokens, np.int32)
    positions, _ = layout.positions(row, [each.grid for each in encoded])
    n, size = len(row) - 1, round_up(len(row) - 1)

    def padded(x: np.ndarray, value: int = 0) -> np.ndarray:
        out = np.full((1, size, *x.shape[1:]), value, np.int32)
        out[0, :n] = x[:n]
        return out

    zero = np.zeros(1, np.int32)
    stacked = None
    if encoded:
        found = layout.collate([each.image for each in encoded], bucket)
        stacked = Images(*(np.swapaxes(x, 0, 1) for x in found))
    return Batch(
        prompt=Prompt(
            padded(row),
            padded(positions),
            np.arange(size)[None] < n,
            padded(np.asarray(slots, np.int32), -1),
        ),
        last_token=row[-1:],
        next_position=positions[-1:, 0],
        images=stacked,
        shared_length=zero,
        shared_position=zero,
        answers=zero,
        grades=np.zeros((1, 1), np.float32),
        weight=np.ones(1, np.float32),
    )


@dataclasses.dataclass(frozen=True)
class Choice:
    """A response: its text, its tokens, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


def respond(predictor: Predictor, request: ChatRequest) -> tuple[list[Choice], int]:
    """Samples the responses to a request.

    Args:
      predictor: holds the policy.
      request: what is asked.

    Returns:
      The responses, and the number of tokens of the prompt.

    Raises:
      UserError: as `encode_chat`.
    """
    policy, wanted = predictor.policy, request.sampling.max_tokens
    room = policy.shapes.max_position_embeddings
    batch = encode_chat(policy.processor, request.turns, request.images, room - wanted)
    # Few lengths are compiled; what is over the wanted one is cut off.
    longest = 1 << (wanted - 1).bit_length()
    sampling = request.sampling._replace(max_tokens=longest, stop=predictor.rollout.sampling.stop)
    rollout = dataclasses.replace(
        predictor.rollout, reflection=None, sampling=sampling, group_size=request.choices
    )
    _, samples = rollout.respond(policy.params, batch, jax.random.key(request.seed))
    samples = jax.device_get(samples)
    found = []
    for tokens, length, ended in zip(
        samples.tokens[0], samples.lengths[0], samples.ended[0], strict=True
    ):
        kept = min(int(length), wanted)
        text = policy.processor.tokenizer.decode(tokens[:kept], skip_special_tokens=True)
        ended = bool(ended) and int(length) <= wanted
        cut = min((at for at in (text.find(stop) for stop in request.stop) if at >= 0), default=-1)
        found.append(Choice(text if cut < 0 else text[:cut], kept, ended or cut >= 0))
    return found, int(batch.prompt.mask.sum()) + 1


def completion(request: ChatRequest, choices: Sequence[Choice], prompt: int) -> dict[str, Any]:
    """Returns the body of an answer, as OpenAI's.

    Args:
      request: what was asked.
      choices: the responses.
      prompt: tokens of the prompt.
    """
    said = sum(each.tokens for each in choices)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": math.floor(time.time()),
        "model": request.model,
        "choices": [
            {
                "index": i,
                "message": {"role": "assistant", "content": each.text},
                "logprobs": None,
                "finish_reason": "stop" if each.ended else "length",
            }
            for i, each in enumerate(choices)
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": said,
            "total_tokens": prompt + said,
        },
    }


def stream_events(body: dict[str, Any], with_usage: bool) -> list[dict[str, Any]]:
    """Returns the events of a stream that says what `completion` says."""
    common = {name: body[name] for name in ("id", "created", "model")}
    common |= {"object": "chat.completion.chunk"}
    events = []
    for choice in body["choices"]:
        for delta, reason in ((choice["message"], None), ({}, choice["finish_reason"])):
            piece = {"index": choice["index"], "delta": delta, "finish_reason": reason}
            events.append(common | {"choices": [piece]})
    if with_usage:
        events.append(common | {"choices": [], "usage": body["usage"]})
    return events
