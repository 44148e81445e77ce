"""A tiny policy with strong random weights, prompts with an image each, and a sampler."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from emor3_jax.learner.logprobs import LogprobSpec, score_responses
from emor3_jax.models import Policy
from emor3_jax.models.cache import KV
from emor3_jax.rollout.engine import Engine, Finished, Plan
from emor3_jax.rollout.rollout import prefill
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.rollout.slots import Admission
from emor3_jax.types import Batch, Images, Prompt, Samples
from support import tiny

STOP, SUPPRESSED = 7, (70, 71, 72, 73)


class Setting(NamedTuple):
    """A policy and its prompts, each without its last token."""

    policy: Policy
    params: dict
    prompt: Prompt
    images: Images
    last: np.ndarray
    position: np.ndarray
    suppressed: np.ndarray

    @property
    def batch(self) -> Batch:
        zeros = np.zeros(len(self.last), np.int32)
        return Batch(
            prompt=self.prompt,
            last_token=self.last,
            next_position=self.position,
            images=self.images,
            shared_length=zeros,
            shared_position=zeros,
            answers=zeros,
            grades=np.zeros((len(zeros), 2), np.float32),
            weight=np.ones(len(zeros), np.float32),
        )

    def prefix(self) -> KV:
        return prefill(self.params, self.batch, policy=self.policy)

    def roll_out(self, sampling: Sampling, seed: int, g: int) -> Samples:
        return self.roll_out_in(Plan(block=4), sampling, seed, g)

    def roll_out_in(self, plan: Plan, sampling: Sampling, seed: int, g: int) -> Samples:
        return in_order(list(self.finish(plan, sampling, seed, g)))

    def finish(self, plan: Plan, sampling: Sampling, seed: int, g: int) -> Iterator[Finished]:
        prompts = len(self.last)
        size = min(plan.refill or plan.slots or prompts, prompts)
        prefix = self.prefix()

        def admissions() -> Iterator[Admission]:
            for at in range(0, prompts, size):
                rows = slice(at, at + size)
                part = KV(prefix.k[:, rows], prefix.v[:, rows], prefix.mask[rows])
                row = np.arange(at, at + size, dtype=np.int32)
                yield Admission(row, self.last[rows], self.position[rows], part)

        mesh = jax.sharding.get_abstract_mesh()
        parts = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
        engine = Engine(self.policy, sampling, plan, g, parts, self.suppressed)
        return engine.run(self.params, admissions(), prompts, jax.random.key(seed))

    def score(self, params, responses, lengths, temperature=1.0):
        shape = responses.shape
        samples = Samples(responses, np.zeros(shape, np.float32), lengths, np.ones(shape[:2], bool))
        spec = LogprobSpec(temperature, 8)
        return score_responses(
            self.policy, params, self.batch, samples, spec, self.suppressed
        ).logprobs


def in_order(found: Sequence[Finished]) -> Samples:
    """Returns all responses on the host, in the order of their prompts."""
    order = np.argsort(np.concatenate([each.row for each in found]))
    return jax.tree.map(lambda *x: np.concatenate(x)[order], *[each.samples for each in found])


def build_setting(b: int = 2, family: str = "qwen2_5_vl") -> Setting:
    """Returns a setting of `b` prompts, for a tiny policy of a family."""
    policy = tiny.make_policy(family)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        if name in ("scale", "bias"):
            return (name == "scale") + 0.3 * noise
        gain = 0.35 if name == "embedding" else 1.3 / np.sqrt(leaf.shape[-2])
        return (gain * noise).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, policy.param_shapes())
    p = 9
    tokens = rng.integers(8, 60, (b, p)).astype(np.int32)
    slots = np.full((b, p), -1, np.int32)
    slots[:, 1:5] = np.arange(4)
    lengths = rng.integers(6, p + 1, b)
    mask = np.arange(p) < lengths[:, None]
    positions = np.broadcast_to(np.arange(p, dtype=np.int32)[None, :, None], (b, p, 3))
    # 4 x 4 patches, which may fill a window.
    size = policy.shapes.vision.window_patches
    coords = np.stack(np.divmod(np.arange(16), 4), -1).astype(np.int32)
    coords = np.pad(coords, ((0, size - 16), (0, 0)))
    images = Images(
        rng.normal(size=(b, 1, 1, size, tiny.VISION.patch_dim)).astype(np.float32),
        np.broadcast_to(coords, (b, 1, 1, size, 2)),
        np.broadcast_to(np.arange(size) < 16, (b, 1, 1, size)),
    )
    suppressed = np.zeros(policy.shapes.vocab_size, bool)
    suppressed[list(SUPPRESSED)] = True
    last = rng.integers(8, 60, b).astype(np.int32)
    prompt = Prompt(tokens, positions, mask, slots)
    return Setting(policy, params, prompt, images, last, lengths.astype(np.int32), suppressed)
