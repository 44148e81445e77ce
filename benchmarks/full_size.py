"""A published policy at its full size: load, prefill, decode.

    python -m benchmarks.full_size [--policy=Qwen/Qwen3-VL-4B-Instruct]

Writes a folder with the exact names and shapes of the hub's files (random bfloat16, 7.5 GB for
Qwen2.5-VL-3B), then, in a process of its own, reads it and runs one image through prefill and 16
tokens of decode. Prints the time of each stage and the peak of the host's memory against the
parameters'. The peak counts all resident pages, those of mapped files included.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from emor3_jax import models
from emor3_jax.models import Policy, weights
from emor3_jax.models.cache import KV
from emor3_jax.models.params import count_params
from emor3_jax.rollout.generate import Opening, generate
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.types import Samples

# XLA computes bfloat16 products in float32 on CPU. By default it converts the weights of all layers
# before the loop over them, which takes twice the parameters' memory again.
OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
TOKENS = 16
SIDE = 448
"""Pixels of a side of the image: 256 image tokens."""
TEXT = 40


class RandomLeaf:
    """Stands for a parameter and draws one layer, or the whole of it, when it is read."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self.shape, self.dtype, self._seed = shape, np.dtype(ml_dtypes.bfloat16), seed

    def _draw(self, shape: tuple[int, ...], seed: int) -> np.ndarray:
        rng = np.random.default_rng((self._seed, seed))
        if len(shape) == 1:
            return np.ones(shape, self.dtype)
        scale = np.float32(0.5 / shape[-2] ** 0.5)
        return (rng.standard_normal(shape, np.float32) * scale).astype(self.dtype)

    def __getitem__(self, layer: int) -> np.ndarray:
        return self._draw(self.shape[1:], layer)

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self._draw(self.shape, 0)


def write(policy: Policy, folder: Path) -> None:
    """Writes a policy of random weights, without tokenizer."""
    shapes, structure = jax.tree.flatten(policy.param_shapes())
    leaves = [RandomLeaf(leaf.shape, seed) for seed, leaf in enumerate(shapes)]
    folder.mkdir(parents=True, exist_ok=True)
    weights.write_params(jax.tree.unflatten(structure, leaves), policy, folder)
    (folder / "config.json").write_text(json.dumps(policy.shapes.to_hf(), indent=2))


def peak_bytes() -> int:
    """Returns the largest number of resident bytes that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(folder: Path) -> dict[str, float]:
    """Loads, prefills and decodes; returns seconds and bytes."""
    result = {"start_bytes": peak_bytes()}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        result[f"{name}_s"] = time.perf_counter() - started
        result[f"{name}_bytes"] = peak_bytes()

    with stage("load"):
        policy = models.read_config(folder).with_compute(dtype=jnp.bfloat16)
        params = jax.block_until_ready(weights.read_params(folder, policy, dtype=None))
    result["params"] = count_params(params)
    result["params_bytes"] = sum(x.nbytes for x in jax.tree.leaves(params))

    rng, shapes = np.random.default_rng(0), policy.shapes
    rows = SIDE // shapes.vision.patch_size
    image = [shapes.image_token_id] * (rows**2 // shapes.merge_unit)
    text = rng.integers(0, 150_000, TEXT)
    ids = np.array([[*text[:10], shapes.vision_start_token_id, *image, *text[10:]]])
    pixels = rng.normal(size=(rows**2, shapes.vision.patch_dim)).astype(np.float32)
    prompt, images, following = models.pack(
        policy, ids, np.ones_like(ids), pixels, [(1, rows, rows)]
    )
    last, prompt.mask[0, -1] = prompt.tokens[:, -1:], False

    @jax.jit
    def prefill(params: dict) -> KV:
        return policy.prefill(params, prompt, images)

    @jax.jit
    def decode(params: dict, prefix: KV) -> Samples:
        one = jnp.ones((1, 1), jnp.int32)
        return generate(
            policy,
            params,
            Opening(prefix, last[:, None], one, following[:, None] - 1),
            lambda t: jax.random.uniform(jax.random.key(t), (1, 1)),
            Sampling(TOKENS, 1.0, 1.0, ()),
            jnp.zeros(shapes.vocab_size, bool),
        )

    with stage("compile"):
        abstract = jax.eval_shape(prefill, params)
        run_prefill = prefill.lower(params).compile(compiler_options=OPTIONS)
        run_decode = decode.lower(params, abstract).compile(compiler_options=OPTIONS)
    with stage("prefill"):
        prefix = jax.block_until_ready(run_prefill(params))
    with stage("decode"):
        samples = jax.block_until_ready(run_decode(params, prefix))
    assert np.isfinite(samples.logprobs).all() and int(samples.lengths[0, 0]) == TOKENS
    result["prompt_tokens"] = ids.shape[1]
    return result


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="Qwen/Qwen2.5-VL-3B-Instruct")
    parser.add_argument("--folder", type=Path, default=Path("runs/full_size"))
    parser.add_argument("--keep", action="store_true", help="do not delete the folder at the end")
    parser.add_argument("--stage", choices=("write", "run"), help="for the program's own use")
    arguments = parser.parse_args()
    policy = models.published(arguments.policy)
    if policy is None:
        parser.error(f"--policy={arguments.policy}: no policy of that id is published")
    if arguments.stage == "write":
        write(policy, arguments.folder)
        return
    if arguments.stage == "run":
        print(json.dumps(run(arguments.folder)))
        return

    def child(stage: str) -> str:
        command = [sys.executable, "-m", "benchmarks.full_size", f"--stage={stage}"]
        command += [f"--policy={arguments.policy}", f"--folder={arguments.folder}"]
        return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout

    try:
        child("write")
        result = json.loads(child("run").splitlines()[-1])
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.folder, ignore_errors=True)
    size = result["params_bytes"]
    print(f"{date.today()}, {jax.default_backend()}, {arguments.policy}, bfloat16")
    print(f"{result['params']:,} parameters, {size / 1e9:.2f} GB")
    print(f"{result['prompt_tokens']} prompt tokens, {TOKENS} tokens decoded\n")
    print("| stage | seconds | peak GB so far | over the parameters |\n|---|---|---|---|")
    print(f"| start | | {result['start_bytes'] / 1e9:.2f} | |")
    for stage in ("load", "compile", "prefill", "decode"):
        peak = result[f"{stage}_bytes"]
        print(f"| {stage} | {result[f'{stage}_s']:.1f} | {peak / 1e9:.2f} | {peak / size:.2f} |")


if __name__ == "__main__":
    main()
