"""A tiny policy with strong random weights, two prompts with an image each, and a sampler."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from emor3_jax.models.cache import KV
from emor3_jax.models.qwen2_5_vl import model
from emor3_jax.models.qwen2_5_vl.shapes import Config
from emor3_jax.rollout import engine
from emor3_jax.rollout.engine import Finished, Opening, Plan
from emor3_jax.rollout.generate import SamplingRule
from emor3_jax.rollout.score import score_responses
from emor3_jax.types import Images, Prompt, Samples

STOP, BANNED = 7, (70, 71, 72, 73)


class Setting(NamedTuple):
    """A policy and its prompts, each without its last token."""

    config: Config
    params: dict
    prompt: Prompt
    images: Images
    last: np.ndarray
    position: np.ndarray
    banned: np.ndarray

    def prefix(self) -> KV:
        features = model.encode_images(self.config, self.params, self.images)
        return model.forward_prompt(self.config, self.params, self.prompt, features)[1]

    def roll_out(self, rule: SamplingRule, seed: int, g: int) -> Samples:
        return self.roll_out_in(Plan(block=4), rule, seed, g)

    def roll_out_in(self, plan: Plan, rule: SamplingRule, seed: int, g: int) -> Samples:
        found = list(self.finish(plan, rule, seed, g))
        order = np.argsort(np.concatenate([each.row for each in found]))
        return jax.tree.map(lambda *x: jnp.concatenate(x)[order], *[each.samples for each in found])

    def finish(self, plan: Plan, rule: SamplingRule, seed: int, g: int) -> Iterator[Finished]:
        prompts = len(self.last)
        size = min(plan.refill or plan.slots or prompts, prompts)
        prefix = jax.jit(self.prefix)()

        def openings() -> Iterator[Opening]:
            for at in range(0, prompts, size):
                rows = slice(at, at + size)
                part = KV(prefix.k[:, rows], prefix.v[:, rows], prefix.mask[rows])
                row = np.arange(at, at + size, dtype=np.int32)
                yield Opening(row, self.last[rows], self.position[rows], part)

        return engine.roll_out(
            openings(),
            prompts,
            jax.random.key(seed),
            self.params,
            self.banned,
            config=self.config,
            responses=g,
            rule=rule,
            plan=plan,
        )

    def score(self, params, responses, lengths, temperature=1.0):
        return score_responses(
            self.config,
            params,
            self.prompt,
            self.images,
            self.last,
            self.position,
            responses,
            lengths,
            banned=self.banned,
            temperature=temperature,
            chunk=8,
        ).logprobs


def build_setting(b: int = 2) -> Setting:
    config = tiny.make_config()
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        if name in ("scale", "bias"):
            return (name == "scale") + 0.3 * noise
        gain = 0.35 if name == "embedding" else 1.3 / np.sqrt(leaf.shape[-2])
        return (gain * noise).astype(np.float32)

    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    p = 9
    tokens = rng.integers(8, 60, (b, p)).astype(np.int32)
    slots = np.full((b, p), -1, np.int32)
    slots[:, 1:5] = np.arange(b)[:, None] * 4 + np.arange(4)
    lengths = rng.integers(6, p + 1, b)
    mask = np.arange(p) < lengths[:, None]
    positions = np.broadcast_to(np.arange(p, dtype=np.int32)[None, :, None], (b, p, 3))
    coords = np.stack(np.divmod(np.arange(16), 4), -1).astype(np.int32)
    images = Images(
        rng.normal(size=(b, 1, 16, config.vision.patch_dim)).astype(np.float32),
        np.broadcast_to(coords, (b, 1, 16, 2)),
        np.ones((b, 1, 16), bool),
    )
    banned = np.zeros(config.vocab_size, bool)
    banned[list(BANNED)] = True
    last = rng.integers(8, 60, b).astype(np.int32)
    prompt = Prompt(tokens, positions, mask, slots)
    return Setting(config, params, prompt, images, last, lengths.astype(np.int32), banned)


@pytest.fixture(scope="session")
def make_setting():
    """Builds a setting of another number of prompts."""
    return build_setting


@pytest.fixture(scope="session")
def setting() -> Setting:
    return build_setting()


@pytest.fixture(scope="session")
def rule() -> SamplingRule:
    return SamplingRule(max_tokens=10, temperature=0.8, top_p=1.0, stop=(STOP,))


@pytest.fixture(scope="session")
def samples(setting, rule) -> Samples:
    return setting.roll_out(rule, 3, 6)
