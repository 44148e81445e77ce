"""Generation alone beside transformers' generate. python -m benchmarks.generation

Both sample G responses to each of B prompts with the same policy of 26.5 million parameters
(`small_policy`), the same images and the same questions, at temperature 1 without top-p, and take
turns. A run is all of it: images through the vision tower, prompts, and token after token.
Images are cut into patches and questions tokenised beforehand, on both sides, and all programs
compiled.

* 2 x 4: every response has exactly 64 tokens.
* 8 x 8: up to 64 tokens; a seeded draw of one id in 40 ends a response, so that lengths are ragged.
  Each side draws its own, and the longer they are the more tokens share a prompt: three times as
  many runs even that out.

Tokens per second count the tokens of responses, the one that ends them included, not padding. The
best of transformers (`peer_generate`: float32 and bfloat16, growing and static cache) is compared
with our best, twice: generate by itself with `num_return_sequences`, which encodes each image
once and reads each prompt G times; and with the prompt's cache made beforehand and repeated by
hand, the most that its users can share. Checked in each run: all ways of transformers give the same
most probable tokens in float32, and so do we.
"""

import argparse
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import small_policy
from benchmarks.options import whole
from benchmarks.peers import Peer
from benchmarks.step import PRECISIONS, Ours, batch_of, make_config, question
from emor3_jax.models.params import cast_for_decoding
from emor3_jax.rollout.engine import Engine, Plan
from emor3_jax.rollout.rollout import prefill
from emor3_jax.rollout.slots import Admission

RUNS, WARM_UP = 7, 2
CASES = ((2, 4, 224, False), (8, 8, 224, True))
"""Prompts, responses, side of an image, whether lengths are ragged."""
TOKENS, BLOCK = 64, 16
"""T, and after how many tokens ended responses are looked for where lengths are ragged."""
ENDS = 40
"""One id in so many ends a response where lengths are ragged."""


def draw_stop_ids(suppressed: np.ndarray, ragged: bool) -> tuple[int, ...]:
    """Returns the ids that end a response."""
    allowed = np.flatnonzero(~suppressed)
    count = len(allowed) // ENDS if ragged else 0
    return tuple(sorted(np.random.default_rng(0).choice(allowed, count, replace=False).tolist()))


def run_case(
    case: tuple[int, int, int, bool], folder: Path, runs: int, peers: tuple[str, ...]
) -> None:
    """Measures one case and prints its table; `peers` are precisions of transformers."""
    b, g, side, ragged = case
    sides = {name: Ours(make_config((b, g, side), folder, name, False)) for name in PRECISIONS}
    stop = draw_stop_ids(sides["float32"].rollout.suppressed, ragged)
    sampling = sides["float32"].rollout.sampling._replace(stop=stop)
    batch = batch_of(sides["float32"], range(b))
    job = {
        "policy": str(folder / "policy"),
        "rows": str(folder / f"{side}.parquet"),
        "question": question(),
        "prompts": b,
        "responses": g,
        "tokens": TOKENS,
        "stop": stop,
        "precisions": peers,
    }
    peer = Peer("benchmarks.peer_generate", job)
    assert peer.facts["ways_agree"], "transformers disagrees with itself"

    def generate(ours: Ours, run: int, **changes: Any) -> tuple[float, np.ndarray, np.ndarray]:
        policy = ours.policy.policy
        unroll = policy.dtype == jnp.bfloat16
        plan = Plan(block=BLOCK if ragged else TOKENS, halvings=3, unroll=unroll)
        suppressed = ours.rollout.suppressed
        engine = Engine(policy, sampling._replace(**changes), plan, g, 1, suppressed)
        started = time.perf_counter()
        # What `Rollout` does before reflections and rewards.
        params = cast_for_decoding(ours.policy.params, policy.dtype)
        key, _ = jax.random.split(jax.random.key(run))
        prefix = prefill(params, batch, policy=policy)
        rows = np.arange(b, dtype=np.int32)
        admission = Admission(rows, batch.last_token, batch.next_position, prefix)
        (finished,) = engine.run(params, iter([admission]), b, key)
        samples = jax.block_until_ready(finished.samples)
        seconds = time.perf_counter() - started
        return seconds, np.asarray(samples.tokens), np.asarray(samples.lengths)

    agree = check_greedy(peer.facts["greedy"], *generate(sides["float32"], 0, temperature=0.0)[1:])
    # Which programs a run needs depends on when its responses end: all are compiled beforehand.
    for run in range(WARM_UP, WARM_UP + runs):
        for ours in sides.values():
            generate(ours, run)
    speeds: dict[str, list[float]] = {}
    lengths: dict[str, list[int]] = {}
    for run in range(WARM_UP + runs):
        results = {}
        for name, ours in sides.items():
            seconds, _, found = generate(ours, run)
            results[f"emor3_jax, {name}"] = seconds, found.flatten().tolist()
        for name, said in peer.turn().items():
            results[f"transformers, {name}"] = said["seconds"], said["lengths"]
        for name, (seconds, found) in results.items():
            if not ragged:
                assert found == [TOKENS] * (b * g), (name, found)
            if run >= WARM_UP:
                speeds.setdefault(name, []).append(sum(found) / seconds)
                lengths.setdefault(name, []).extend(found)
    peer.close()
    print(f"\n{b} prompts of {peer.facts['prompt_tokens']} tokens x {g} responses\n")
    print("| | tokens a second, median | slowest | fastest | of our best | tokens a response |")
    print("|---|---|---|---|---|---|")
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ours = max(v for k, v in medians.items() if k.startswith("emor3_jax"))
    theirs = {k: v for k, v in medians.items() if k.startswith("transformers")}
    shipped = max(v for k, v in theirs.items() if "shared" not in k)
    for name, median in medians.items():
        each = speeds[name]
        print(
            f"| {name} | {median:.0f} | {min(each):.0f} | {max(each):.0f} |"
            f" {median / ours:.2f} | {statistics.mean(lengths[name]):.1f} |"
        )
    print(
        f"\nour best / best of generate by itself: {ours / shipped:.2f}; "
        f"/ best with the cache repeated by hand: {ours / max(theirs.values()):.2f}"
    )
    print(f"most probable tokens, float32: {agree}")


def check_greedy(theirs: list[list[int]], tokens: np.ndarray, lengths: np.ndarray) -> str:
    """Says how many of the prompts have the same greedy response on both sides."""
    same = sum(
        row[:n].tolist() == other[:n]
        for row, n, other in zip(tokens[:, 0], lengths[:, 0], theirs, strict=True)
    )
    return f"{same} of {len(theirs)} responses are transformers' own"


def main() -> None:
    """Writes policy and images, runs the cases, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="keep policy and images here")
    parser.add_argument("--runs", type=whole(1), default=RUNS)
    parser.add_argument("--cases", type=whole(0), nargs="*", default=range(len(CASES)))
    # torch takes hours for bfloat16 where it emulates it, on a processor without AVX-512.
    parser.add_argument("--peers", nargs="*", default=PRECISIONS, choices=PRECISIONS)
    options = parser.parse_args()
    if tuple(options.peers[:1]) != ("float32",):
        parser.error("--peers: must begin with float32, in which most probable tokens are compared")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        count = small_policy.write_policy(folder / "policy")
        print(f"{date.today()}, {jax.devices()[0].device_kind}, {count / 1e6:.1f} M parameters")
        for number in options.cases:
            case = CASES[number]
            small_policy.write_rows(folder / f"{case[2]}.parquet", case[2], 16)
            run_case(case, folder, options.runs * (3 if case[3] else 1), tuple(options.peers))


if __name__ == "__main__":
    main()
