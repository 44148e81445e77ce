"""Every back end against plain attention written out in NumPy, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.models import attention, attention_kernels
from emor3_jax.models.attention import Own, Shared, attend

B, G, HEADS, KV_HEADS, WIDTH = 2, 2, 4, 2, 8


def oracle(q, k, v, visible):
    """float64 attention: scaled q [S, heads, d], k and v [C, kv_heads, d], visible [S, C]."""
    copies = q.shape[1] // k.shape[1]
    k, v = (np.repeat(np.asarray(x, np.float64), copies, axis=1) for x in (k, v))
    scores = np.einsum("shd,chd->hsc", np.asarray(q, np.float64), k)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hsc,chd->shd", weights / weights.sum(axis=-1, keepdims=True), v)


class Case:
    """Random queries and keys: a prompt with padding on the right, ragged continuations."""

    def __init__(self, s: int, p: int, causal: bool, seed: int = 0):
        rng = np.random.default_rng(seed)
        draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
        self.causal, self.p = causal, p
        self.q = draw(B, G, s, HEADS, WIDTH) / np.float32(WIDTH**0.5)
        self.own_k, self.own_v = draw(B, G, s, KV_HEADS, WIDTH), draw(B, G, s, KV_HEADS, WIDTH)
        self.prefix_k, self.prefix_v = draw(B, p, KV_HEADS, WIDTH), draw(B, p, KV_HEADS, WIDTH)
        self.lengths = rng.integers(s // 2, s + 1, (B, G))
        # Causal padding is on the right; elsewhere it may lie anywhere.
        self.own_mask = np.arange(s) < self.lengths[..., None]
        if not causal:
            self.own_mask = rng.random((B, G, s)) < 0.7
        self.prefix_mask = np.arange(p) < rng.integers(p // 2, p + 1, B)[:, None] if p else None

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.q, self.own_k, self.own_v, self.prefix_k, self.prefix_v

    def sources(self, own_k, own_v, prefix_k, prefix_v):
        k, v = attention.slots_last(own_k, own_v)
        own = Own(k, v, jnp.asarray(self.own_mask), self.causal)
        if not self.p:
            return None, own
        return Shared(*attention.slots_last(prefix_k, prefix_v), jnp.asarray(self.prefix_mask)), own

    def expected(self) -> np.ndarray:
        out = np.zeros(self.q.shape)
        for b in range(B):
            for g in range(G):
                seen = np.broadcast_to(self.own_mask[b, g], (self.q.shape[2],) * 2)
                if self.causal:
                    seen = seen & np.tri(len(seen), dtype=bool)
                k, v = self.own_k[b, g], self.own_v[b, g]
                if self.p:
                    before = np.broadcast_to(self.prefix_mask[b], (len(seen), self.p))
                    seen = np.concatenate([before, seen], axis=1)
                    k = np.concatenate([self.prefix_k[b], k])
                    v = np.concatenate([self.prefix_v[b], v])
                out[b, g] = oracle(self.q[b, g], k, v, seen)
        return out

    def real(self) -> np.ndarray:
        """bool[B, G, S], queries whose result means something."""
        return self.own_mask if self.causal else np.ones_like(self.own_mask)


def by_blocks(q, prefix, own):
    return attention._attend_xla(q, [own] if prefix is None else [prefix, own])


BACKENDS = {
    "xla": by_blocks,
    "splash": functools.partial(attention_kernels.splash, interpret=True),
    "cudnn": functools.partial(attention_kernels.cudnn, implementation="xla"),
}
CASES = {
    "prompt": (150, 0, True),
    "image": (192, 0, False),
    "continuation": (140, 37, True),
    "long prompt before short continuations": (20, 200, True),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """XLA computes the queries in several parts, and the last one is not full."""
    monkeypatch.setattr(attention, "_QUERIES", 64)


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values(backend, sizes):
    case = Case(*sizes)
    actual = jax.jit(lambda q, *rest: BACKENDS[backend](q, *case.sources(*rest)))(*case.arrays())
    real = case.real()
    np.testing.assert_allclose(np.asarray(actual)[real], case.expected()[real], atol=2e-6)


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, sizes, monkeypatch):
    """Against those of XLA in one block, which autodiff derives from the plain formula."""
    case = Case(*sizes, seed=1)
    cotangent = np.random.default_rng(2).normal(size=case.q.shape) * case.real()[..., None, None]

    def gradient(attend):
        def loss(q, *rest):
            return jnp.sum(attend(q, *case.sources(*rest)) * cotangent)

        return jax.jit(jax.grad(loss, argnums=tuple(range(5))))(*case.arrays())

    actual = gradient(BACKENDS[backend])
    monkeypatch.setattr(attention, "_QUERIES", 10**6)
    for ours, theirs in zip(actual, gradient(by_blocks), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_row_that_sees_nothing_is_finite():
    case = Case(128, 0, False)
    case.own_mask[0, 1] = False
    for backend in BACKENDS.values():
        value, grads = jax.jit(
            jax.value_and_grad(
                lambda q, *rest, backend=backend: jnp.sum(backend(q, *case.sources(*rest)) ** 2),
                argnums=(0, 1, 2),
            )
        )(*case.arrays())
        assert np.isfinite(value) and all(np.isfinite(x).all() for x in grads)


class PackedCase(Case):
    """Continuations that share two rows, each of one of several prompts."""

    def __init__(self, s: int, prompts: int, p: int, seed: int = 0):
        super().__init__(s, prompts * p, True, seed)
        rng = np.random.default_rng(seed + 7)
        self.prompts, self.responses = prompts, 3
        self.segments = np.full((B, G, s), -1)
        for b in range(B):
            for g, names in enumerate(np.split(np.arange(prompts * self.responses), [prompts])):
                cuts = np.sort(rng.choice(np.arange(1, s), len(names), replace=False))
                for name, start, end in zip(names, [0, *cuts[:-1]], cuts, strict=True):
                    self.segments[b, g, start:end] = name
        self.own_mask = self.segments >= 0
        if prompts > 1:
            each = np.arange(p) < rng.integers(p // 2, p + 1, (B, prompts))[..., None]
            self.prefix_mask = each.reshape(B, -1)

    def sources(self, *keys):
        prefix, own = super().sources(*keys)
        segments = jnp.asarray(self.segments)
        own = own._replace(segments=segments)
        if self.prompts > 1:
            own = own._replace(owners=jnp.maximum(segments, 0) // self.responses)
        return prefix._replace(prompts=self.prompts), own

    def expected(self) -> np.ndarray:
        out = np.zeros(self.q.shape)
        size = self.p // self.prompts
        for b, g in np.ndindex(B, G):
            name = self.segments[b, g]
            own = (name[:, None] == name) & np.tri(len(name), dtype=bool)
            owner = np.maximum(name, 0) // self.responses if self.prompts > 1 else 0 * name
            before = self.prefix_mask[b] & (owner[:, None] == np.arange(self.p) // size)
            seen = np.concatenate([before, own], axis=1)
            k = np.concatenate([self.prefix_k[b], self.own_k[b, g]])
            v = np.concatenate([self.prefix_v[b], self.own_v[b, g]])
            out[b, g] = oracle(self.q[b, g], k, v, seen)
        return out


PACKED = [
    (backend, sizes)
    for backend in BACKENDS
    # cuDNN has the rows of each prompt apart.
    for sizes in ((300, 1, 40), (200, 2, 70))
    if backend != "cudnn" or sizes[1] == 1
]


@pytest.mark.parametrize(("backend", "sizes"), PACKED)
def test_continuations_that_share_rows_see_their_prompt_and_themselves(backend, sizes, monkeypatch):
    case = PackedCase(*sizes)
    real = case.own_mask
    cotangent = np.random.default_rng(2).normal(size=case.q.shape) * real[..., None, None]

    def run(attend):
        def loss(q, *rest):
            out = attend(q, *case.sources(*rest))
            return jnp.sum(out * cotangent), out

        grad = jax.grad(loss, argnums=tuple(range(5)), has_aux=True)
        return jax.jit(grad)(*case.arrays())

    grads, out = run(BACKENDS[backend])
    np.testing.assert_allclose(np.asarray(out)[real], case.expected()[real], atol=2e-6)
    assert np.isfinite(out).all()
    monkeypatch.setattr(attention, "_QUERIES", 10**6)
    for ours, theirs in zip(grads, run(by_blocks)[0], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_the_mask_of_packed_continuations_by_hand():
    mask = attention_kernels.PackedMask(prefix=4, prompt=2)
    segments = jnp.asarray([0, 0, 1, 1, 1, 3, -1, -1])
    codes = mask.codes(segments, jnp.asarray([0, 0, 0, 0, 0, 1, 0, 0]))
    seen = np.asarray(mask(*np.broadcast_arrays(np.asarray(codes)[:, None], np.arange(12))))
    image = "\n".join("".join(".x"[int(x)] for x in row) for row in seen)
    assert image == "\n".join(
        [
            "xx..x.......",
            "xx..xx......",
            "xx....x.....",
            "xx....xx....",
            "xx....xxx...",
            "..xx.....x..",
            "xx........x.",
            "xx........xx",
        ]
    )
    blocks = np.asarray(mask.blocks(codes, 2))
    # A block is computed where any of its scores counts, or lies between two that do.
    assert blocks.tolist() == [
        [True, False, True, False, False, False],
        [True, False, False, True, False, False],
        [True, True, False, True, True, False],
        [True, False, False, False, False, True],
    ]
    # The largest place and prompt survive.
    most = attention_kernels.MAX_QUERIES - 1
    segments = jnp.arange(attention_kernels.MAX_QUERIES)
    owners = jnp.full_like(segments, attention_kernels.MAX_PROMPTS - 1)
    codes = attention_kernels.PackedMask(4 * 128, 128).codes(segments, owners)
    columns = jnp.asarray([3 * 128 - 1, 3 * 128, 4 * 128 - 1, 512 + most - 1, 512 + most])
    seen = attention_kernels.PackedMask(4 * 128, 128)(jnp.broadcast_to(codes[-1], 5), columns)
    assert seen.tolist() == [False, True, True, False, True]


def test_packed_continuations_that_are_too_many_are_refused():
    q = jnp.zeros((1, 1, attention_kernels.MAX_QUERIES + 1, 1, 8))
    k, v = attention.slots_last(q, q)
    mask = jnp.ones(q.shape[:3], bool)
    own = Own(k, v, mask, True, jnp.zeros(q.shape[:3], jnp.int32))
    with pytest.raises(ValueError, match="at most 32768 tokens in one sequence"):
        jax.eval_shape(lambda q: attention_kernels.splash(q, None, own, interpret=True), q)


def test_the_mask_of_a_group_by_hand():
    mask = attention_kernels.GroupMask(prefix=2, groups=2, length=3, causal=True)
    assert mask.shape == (6, 8)
    image = "\n".join("".join(".x"[int(x)] for x in row) for row in mask[:, :])
    assert image == "xxx.....\nxxxx....\nxxxxx...\nxx...x..\nxx...xx.\nxx...xxx"
    assert (mask[2:5, 3:7] == mask[:, :][2:5, 3:7]).all()
    assert mask == attention_kernels.GroupMask(2, 2, 3, True)
    assert mask != attention_kernels.GroupMask(2, 2, 3, False)


def test_empty_blocks_are_skipped():
    """Of 4 continuations with 256 tokens each, a block sees the prompt and its own diagonal."""
    mask = attention_kernels.GroupMask(prefix=256, groups=4, length=256, causal=True)
    kernel = attention_kernels._splash_kernel(1, mask, interpret=True)
    computed = np.asarray(kernel.fwd_mask_info.block_mask) > 0
    # Blocks of 256: each of 4 rows of blocks computes the prompt's and its own, of 5.
    assert computed.sum() == 8


@pytest.mark.parametrize("backend", ["splash_interpret", "cudnn"])
def test_decoded_tokens_and_caches_are_left_to_xla(backend):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 2, 1, 2, 8)).astype(np.float32)
    k, v = (rng.normal(size=(1, 2, 200, 1, 8)).astype(np.float32) for _ in range(2))
    own = Own(*attention.slots_last(k, v), jnp.ones((1, 2, 200), bool))
    assert (attend(q, [own], backend) == attend(q, [own])).all()


def largest(jaxpr) -> int:
    """Numbers of the largest array that a program holds, those inside its loops included."""
    found = 0
    for equation in jaxpr.eqns:
        found = max([found, *(int(np.prod(v.aval.shape)) for v in equation.outvars)])
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found = max(found, largest(inner))
    return found


def branches(jaxpr):
    """Yields the branches of every `cond` in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            yield [branch.jaxpr for branch in equation.params["branches"]]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from branches(inner)


def test_no_layer_of_the_tower_holds_the_scores_of_a_whole_image(policy, image_program):
    """64 windows of 16 patches: windowed layers hold a window's scores, full ones a part's."""
    patches, program = image_program
    full, windowed = 0, 0
    for windowed_branch, full_branch in branches(program):
        windowed = max(windowed, largest(windowed_branch))
        full = max(full, largest(full_branch))
    heads = policy.shapes.vision.num_heads
    assert 0 < windowed <= heads * patches * policy.shapes.vision.window_patches
    assert windowed < full <= heads * patches * 2 * attention._QUERIES
    assert largest(program) < patches**2


@pytest.fixture
def image_program(policy, params):
    """Patches of an image and the program that encodes it and differentiates."""
    grid = (1, 32, 32)
    patches = np.zeros((32 * 32, policy.shapes.vision.patch_dim), np.float32)
    images = policy.layout.collate([policy.layout.arrange(patches, grid).image], 64)

    def loss(params):
        return jnp.sum(policy.encode_images(params, images))

    return len(patches), jax.make_jaxpr(jax.grad(loss))(params).jaxpr
