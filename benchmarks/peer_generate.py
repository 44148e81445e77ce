"""transformers' generate, the peer of `benchmarks.generation`, which starts this file as a process.

    python -m benchmarks.peer_generate JOB        # JOB: a JSON object, see `Job`

For every line on its standard input it generates once in each of its ways and answers with their
seconds and numbers of tokens. Imports neither JAX nor `emor3_jax`.

The ways are float32 and bfloat16 weights, each with a growing and a static cache and
`num_return_sequences`, by which transformers encodes each image once but still reads each prompt
G times; and "shared": each prompt is read once, its cache is repeated G times, growing or made
static, and generate goes on from there. Attention is scaled_dot_product_attention.
torch.compile is left off, as transformers does on CPU.
"""

import io
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration, StaticCache

from benchmarks.peer_processor import load_processor
from benchmarks.peers import say

WAYS = ("growing", "static", "shared", "shared static")
PRECISIONS = ("float32", "bfloat16")


class Job(NamedTuple):
    """What the peer is asked to do.

    Attributes:
      policy: folder of the policy.
      rows: parquet file; its first `prompts` rows are read.
      question: what is asked of each image, without the image.
      prompts, responses, tokens: B, G, T.
      stop: ids that end a response.
      precisions: of the weights, of `PRECISIONS`; the first is float32.
    """

    policy: str
    rows: str
    question: str
    prompts: int
    responses: int
    tokens: int
    stop: tuple[int, ...]
    precisions: tuple[str, ...] = PRECISIONS


def read_inputs(job: Job) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Returns the prompts as transformers' processor lays them out, and the special ids."""
    processor = load_processor(Path(job.policy))
    table = pq.read_table(job.rows).to_pylist()[: job.prompts]
    images = [Image.open(io.BytesIO(row["images"][0]["bytes"])) for row in table]
    chats = [
        [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": job.question}],
            }
        ]
    ] * len(images)
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    inputs = processor(
        images=[[image] for image in images], text=texts, padding=True, return_tensors="pt"
    )
    return dict(inputs), sorted(processor.tokenizer.added_tokens_decoder)


@torch.no_grad()
def generate(
    model: Qwen2_5_VLForConditionalGeneration,
    inputs: dict[str, torch.Tensor],
    job: Job,
    way: str,
    special: list[int],
    **options: Any,
) -> torch.Tensor:
    """Returns the responses, int64[B * G, at most T], padded after the end."""
    options = {
        "max_new_tokens": job.tokens,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": list(job.stop) or None,
        "pad_token_id": special[0],
        "suppress_tokens": special,
        "num_return_sequences": job.responses,
    } | options
    length = inputs["input_ids"].shape[1]
    if way == "static":
        options["cache_implementation"] = "static"
    if "shared" in way:
        cache = DynamicCache(config=model.config)
        model(
            **{k: v if k in IMAGES else v[:, :-1] for k, v in inputs.items()},
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        g = options.pop("num_return_sequences")
        cache.batch_repeat_interleave(g)
        if way == "shared static":
            fixed = StaticCache(config=model.config, max_cache_len=length + job.tokens)
            for number, layer in enumerate(cache.layers):
                fixed.update(layer.keys, layer.values, number)
            cache = fixed
        # The rope positions that follow the images are kept in the model, one a prompt.
        model.model.rope_deltas = model.model.rope_deltas.repeat_interleave(g, 0)
        inputs = {
            k: v.repeat_interleave(g, 0)
            for k, v in inputs.items()
            if k in ("input_ids", "attention_mask")
        }
        options["past_key_values"] = cache
    return model.generate(**inputs, **options)[:, length:]


IMAGES = ("pixel_values", "image_grid_thw")


def count_tokens(responses: torch.Tensor, stop: tuple[int, ...]) -> list[int]:
    """Returns the length of each response, its last token included."""
    ended = torch.isin(responses, torch.tensor(stop, dtype=responses.dtype))
    before = ended.int().cumsum(1) - ended.int()
    return (before == 0).sum(1).tolist()


def main() -> None:
    """Generates until the input ends."""
    job = Job(**json.loads(sys.argv[1]))
    torch.manual_seed(0)
    inputs, special = read_inputs(job)
    models = {
        name: Qwen2_5_VLForConditionalGeneration.from_pretrained(
            job.policy, dtype=getattr(torch, name), attn_implementation="sdpa"
        ).eval()
        for name in job.precisions
    }
    for model in models.values():
        # What the folder says would be merged into the options.
        model.generation_config.eos_token_id = list(job.stop) or None
    # The most probable id: greedy search takes no num_return_sequences.
    same = [generate(models["float32"], inputs, job, way, special, top_k=1) for way in WAYS]
    say(
        {
            "ways_agree": all(torch.equal(same[0], each) for each in same[1:]),
            "greedy": same[0][:: job.responses].tolist(),
            "prompt_tokens": inputs["input_ids"].shape[1],
        }
    )
    while sys.stdin.readline():
        answer = {}
        for name, model in models.items():
            typed = inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}
            for way in WAYS:
                started = time.perf_counter()
                responses = generate(model, typed, job, way, special)
                seconds = time.perf_counter() - started
                answer[f"{name}, {way}"] = {
                    "seconds": seconds,
                    "lengths": count_tokens(responses, job.stop),
                }
        say(answer)


if __name__ == "__main__":
    main()
