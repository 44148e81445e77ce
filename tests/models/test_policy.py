import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from support import tiny

from emor3_jax.models import (
    Policy,
    attention,
    attention_kernels,
    decode_attention,
    decode_kernel,
)
from emor3_jax.models.cache import Cache
from emor3_jax.parallel.mesh import AXES
from emor3_jax.types import Prompt

B, G, S = 2, 2, 4


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def policy(request) -> Policy:
    return tiny.make_policy(request.param)


@pytest.fixture(scope="module")
def responses():
    """Response tokens, their mask (ragged) and offsets of their positions."""
    tokens = jax.random.randint(jax.random.key(3), (B, G, S), 0, 60)
    mask = jnp.arange(S) < jnp.array([[4, 2], [3, 4]])[..., None]
    return tokens, mask


def _text_prompt(tokens) -> Prompt:
    shape = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(shape[1])[None, :, None], (*shape, 3))
    return Prompt(tokens, positions, jnp.ones(shape, bool), jnp.full(shape, -1))


def _with_embedding(params, table):
    return {**params, "model": {**params["model"], "embed_tokens": {"embedding": table}}}


def _influence(params, hidden_of, tokens):
    """Returns bool[outputs, tokens]: whether any gradient flows from a token to an output.

    Every token has its own id, so the gradient by an embedding's row is that by a token.
    """
    table = params["model"]["embed_tokens"]["embedding"]

    def weighted(table, weights):
        hidden = hidden_of(_with_embedding(params, table))
        return jnp.sum(hidden.reshape(-1, hidden.shape[-1]) ** 3 * weights[:, None])

    n = np.prod(jax.eval_shape(hidden_of, params).shape[:-1])
    grads = jax.jit(jax.vmap(jax.grad(weighted), (None, 0)))(table, jnp.eye(n))
    return np.asarray(jnp.any(grads != 0, axis=-1))[:, np.ravel(tokens)]


def test_prompt_tokens_see_only_what_comes_before(policy, params):
    tokens = jnp.arange(12).reshape(2, 6)

    def hidden_of(params):
        return policy.read_prompt(params, _text_prompt(tokens), None)[0]

    expected = np.kron(np.eye(2), np.tril(np.ones((6, 6)))) > 0
    assert (_influence(params, hidden_of, tokens) == expected).all()


def test_responses_see_their_prompt_and_themselves_and_never_each_other(policy, params):
    prompt = _text_prompt(jnp.arange(6).reshape(B, 3))
    tokens = 10 + jnp.arange(B * G * S).reshape(B, G, S)
    mask = jnp.ones((B, G, S), bool)

    def hidden_of(params):
        _, prefix = policy.read_prompt(params, prompt, None)
        positions = jnp.broadcast_to(3 + jnp.arange(S), tokens.shape)
        return policy.extend(params, prefix, tokens, positions, mask)[0]

    prompt_part = np.kron(np.eye(B), np.ones((G * S, 3))) > 0
    own_part = np.kron(np.eye(B * G), np.tril(np.ones((S, S)))) > 0
    assert (_influence(params, hidden_of, prompt.tokens) == prompt_part).all()
    assert (_influence(params, hidden_of, tokens) == own_part).all()


@pytest.mark.parametrize(
    ("policy", "backend"),
    # The kernels are given queries, keys and masks, whatever the family.
    [
        *((family, "xla") for family in tiny.FAMILIES),
        ("qwen2_5_vl", "splash_interpret"),
        ("qwen2_5_vl", "cudnn"),
    ],
    indirect=["policy"],
)
def test_grouped_pass_equals_flat_pass_in_values_and_gradients(
    policy, params, image_batch, responses, backend, monkeypatch
):
    # The kernels take over from the first query on; cuDNN's formula is computed by XLA.
    monkeypatch.setattr(attention, "_FEW", 0)
    own = functools.partial(attention_kernels.cudnn, implementation="xla")
    monkeypatch.setattr(attention_kernels, "cudnn", own)
    policy = policy.with_compute(attention=backend)
    rematerialised = policy.with_compute(remat="layers")
    prompt, images, following = image_batch
    tokens, mask = responses
    probe = (
        jax.random.normal(jax.random.key(4), (B, G, S, policy.shapes.hidden_size)) * mask[..., None]
    )
    positions = jnp.broadcast_to(following[:, None, None] + jnp.arange(S), (B, G, S))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def grouped(params):
        features = rematerialised.encode_images(params, images)
        hidden = rematerialised.extend_group(params, prompt, features, tokens, positions, mask)
        return jnp.sum(hidden * probe), hidden

    # The flat layout: each response behind its own copy of its prompt, padding moved to the end.
    lengths = np.asarray(prompt.mask.sum(axis=1))
    p = prompt.tokens.shape[1]
    flat = {name: [] for name in Prompt._fields}
    for b in range(B):
        for g in range(G):
            order = np.r_[0 : lengths[b], p : p + S, lengths[b] : p]
            for name, own in (
                ("tokens", tokens[b, g]),
                ("positions", jnp.broadcast_to(positions[b, g][:, None], (S, 3))),
                ("mask", mask[b, g]),
                ("image_slots", jnp.full(S, -1)),
            ):
                flat[name].append(jnp.concatenate([getattr(prompt, name)[b], own])[order])
    flat = Prompt(**{name: jnp.stack(rows) for name, rows in flat.items()})
    places = np.repeat(lengths, G)[:, None] + np.arange(S)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def flatly(params):
        features = policy.encode_images(params, images)
        hidden, _ = policy.read_prompt(params, flat, jnp.repeat(features, G, axis=0))
        hidden = jnp.take_along_axis(hidden, places[..., None], axis=1).reshape(probe.shape)
        return jnp.sum(hidden * probe), hidden

    (_, a), grads_a = grouped(params)
    (_, b), grads_b = flatly(params)
    np.testing.assert_allclose(a[mask], b[mask], atol=2e-5)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(grads_a), jax.tree.leaves(grads_b), strict=True
    ):
        scale = float(jnp.max(jnp.abs(y)))
        name = jax.tree_util.keystr(path)
        # A constant added to all keys of a head changes no softmax but for rope: small gradients.
        assert scale > 1e-3, name
        np.testing.assert_allclose(x, y, atol=3e-4 * scale, err_msg=name)


def test_decoding_token_by_token_equals_one_pass_and_that_of_whole_groups(
    policy, params, image_batch, responses
):
    prompt, images, following = image_batch
    tokens, _ = responses
    # Openings of one and of two tokens, right padded, as a question about a ragged text is.
    lengths = jnp.array([[1, 2], [2, 1]])
    offset = jnp.arange(S)
    place = following[:, None, None] + offset

    @jax.jit
    def one_pass(params):
        features = policy.encode_images(params, images)
        _, prefix = policy.read_prompt(params, prompt, features)
        mask = jnp.ones((B, G, S), bool)
        of_responses = tokens, jnp.broadcast_to(place, (B, G, S)), mask
        hidden, _ = policy.extend(params, prefix, *of_responses)
        at_once = policy.extend_group(params, prompt, features, *of_responses)
        return hidden, at_once, prefix

    expected, at_once, prefix = one_pass(params)
    np.testing.assert_allclose(at_once, expected, atol=2e-5)
    hidden, cache = policy.extend(
        params,
        prefix,
        tokens[..., :2],
        jnp.broadcast_to(place[..., :2], (B, G, 2)),
        offset[:2] < lengths[..., None],
        cache_size=5,
    )
    assert cache.mask.sum(axis=-1).tolist() == lengths.tolist()
    step = jax.jit(policy.decode)
    for t in range(2):
        at = lengths + t
        token = jnp.take_along_axis(tokens, at[..., None], axis=-1)[..., 0]
        hidden, cache = step(
            params, prefix, cache, token, following[:, None] + at, jnp.int32(2 + t)
        )
        wanted = jnp.take_along_axis(expected, at[..., None, None], axis=2)[:, :, 0]
        np.testing.assert_allclose(hidden, wanted, atol=2e-5)
    assert cache.mask.sum(axis=-1).tolist() == (lengths + 2).tolist()
    assert not cache.mask[..., 4].any()


def test_decoding_in_a_ring_equals_whatever_reads_it(policy, params, image_batch, monkeypatch):
    """Three times round a ring of 8 places; a lane that has ended is not looked at."""
    monkeypatch.setattr(decode_attention, "BLOCK", 4)
    monkeypatch.setattr(decode_kernel, "_CHAINS", 2)
    prompt, images, following = image_batch
    ragged = policy.with_compute(decode_attention="ragged_interpret")
    prefix = policy.prefill(params, prompt, images)
    layers, _, heads, width, _ = prefix.k.shape
    empty = functools.partial(jnp.zeros, dtype=jnp.float32)
    places = jnp.zeros((B, G, 8), bool)
    caches = [
        Cache(
            empty((layers, B, G, heads, width, 8)), empty((layers, B, G, heads, 8, width)), places
        )
    ] * 2
    steps = jax.jit(policy.decode), jax.jit(ragged.decode)
    rng = np.random.default_rng(0)
    lengths = np.zeros((B, G), np.int32)
    for step in range(24):
        tokens = jnp.asarray(rng.integers(0, 60, (B, G)), jnp.int32)
        # A lane begins anew with its places masked; the last has ended.
        begins = np.array([[step % 7 == 3, step == 6], [step % 5 == 4, False]])
        lengths = np.where(begins, 0, np.minimum(lengths, 7))
        mask = (np.arange(8) - (step - lengths[..., None])) % 8 < lengths[..., None]
        needed = jnp.asarray(lengths).at[1, 1].set(0)
        found = [
            each(
                params,
                prefix,
                cache._replace(mask=jnp.asarray(mask)),
                tokens,
                jnp.asarray(following[:, None] + lengths),
                jnp.int32(step % 8),
                lengths=needed,
            )
            for each, cache in zip(steps, caches, strict=True)
        ]
        (wanted, _), (hidden, _) = found
        caches = [cache for _, cache in found]
        alive = np.array([[True, True], [True, False]])
        np.testing.assert_allclose(hidden[alive], wanted[alive], atol=2e-5)
        assert np.isfinite(hidden).all()
        lengths += 1
    assert lengths.max() == 8


def test_a_cache_smaller_than_the_tokens_is_refused(policy, params, responses):
    tokens, mask = responses
    with pytest.raises(ValueError, match="cache_size=3 is smaller than the 4"):
        policy.extend(params, None, tokens, tokens, mask, cache_size=3)


@pytest.mark.parametrize("tied", [True, False])
def test_token_logprobs_equal_dense_log_softmax(tied):
    policy = tiny.make_policy(tie_word_embeddings=tied)
    params = tiny.strong_params(policy)
    hidden = jax.random.normal(jax.random.key(5), (2, 3, 7, policy.shapes.hidden_size))
    targets = jax.random.randint(jax.random.key(6), (2, 3, 7), 0, 60)
    suppressed = jnp.arange(policy.shapes.vocab_size) >= 70
    probe = jax.random.normal(jax.random.key(7), (2, *targets.shape))
    head = "model" if tied else "lm_head"

    def dense(part, hidden):
        scores = policy.logits({**params, head: part}, hidden) / 0.7
        logp = jax.nn.log_softmax(jnp.where(suppressed, -jnp.inf, scores))
        entropy = -jnp.sum(jnp.where(suppressed, 0.0, jnp.exp(logp) * logp), axis=-1)
        return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0], entropy

    def chunked(part, hidden):
        return policy.logprobs(
            {**params, head: part},
            hidden,
            targets,
            suppressed=suppressed,
            temperature=0.7,
            chunk=13,  # some tokens are left over
            entropy=True,
        )

    part = params[head]
    np.testing.assert_allclose(chunked(part, hidden), dense(part, hidden), atol=1e-5)

    def gradients(function):
        def loss(*args):
            # -inf - -inf inside the dense form would poison its gradient; its values are finite.
            return jnp.sum(probe * jnp.stack(function(*args)))

        return jax.jit(jax.grad(loss, (0, 1)))(part, hidden)

    def dense_finite(part, hidden):
        scores = policy.logits({**params, head: part}, hidden)[..., :70] / 0.7
        logp = jax.nn.log_softmax(scores)
        chosen = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
        return chosen, -jnp.sum(jnp.exp(logp) * logp, axis=-1)

    for a, b in zip(
        jax.tree.leaves(gradients(chunked)), jax.tree.leaves(gradients(dense_finite)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(("parts", "tokens"), [(1, 4 * 6 * 8), (4, 6 * 8)])
def test_a_chunk_of_logits_is_of_one_device_whatever_the_mesh(policy, params, parts, tokens):
    """Logits of 24 tokens exist at once on each, of 192 over one device or 48 over each of four."""
    hidden = jnp.zeros((4, 6, 8, policy.shapes.hidden_size))
    targets = jnp.zeros((4, 6, 8), jnp.int32)
    mesh = jax.sharding.AbstractMesh((1, parts, 1), AXES, axis_types=(AxisType.Auto,) * 3)

    def score(params, hidden):
        return policy.logprobs(params, hidden, targets, chunk=24)[0]

    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(score)(params, hidden).jaxpr
    loops = [x.params["length"] for x in equations(program) if x.primitive.name == "scan"]
    assert loops == [tokens // 24]
    shapes = {v.aval.shape for x in equations(program) for v in x.outvars}
    logits = [shape for shape in shapes if shape[-1:] == (policy.shapes.vocab_size,)]
    assert max(map(math.prod, logits)) == 24 * policy.shapes.vocab_size


def equations(jaxpr):
    """Every operation of a program, those inside others too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_token_logprobs_without_entropy_or_ban(policy, params):
    hidden = jax.random.normal(jax.random.key(8), (5, policy.shapes.hidden_size))
    targets = jnp.array([1, 2, 3, 4, 79])
    logprobs, entropy = policy.logprobs(params, hidden, targets, chunk=2)
    dense = jax.nn.log_softmax(policy.logits(params, hidden))
    assert entropy is None
    np.testing.assert_allclose(logprobs, dense[jnp.arange(5), targets], atol=1e-5)


def test_features_do_not_depend_on_padding(policy, params):
    rng = np.random.default_rng(9)
    patches = rng.normal(size=(16, policy.shapes.vision.patch_dim)).astype(np.float32)
    layout = policy.layout
    image = layout.arrange(patches, (1, 4, 4)).image
    encode = jax.jit(policy.encode_images)
    alone = encode(params, layout.collate([image], 1))
    padded = encode(params, layout.collate([image], 3))
    np.testing.assert_allclose(padded[:, :4], alone[:, :4], atol=1e-5)
    assert np.isfinite(padded).all()


def test_bfloat16_stays_close_and_padding_stays_finite(policy, params, image_batch):
    prompt, images, _ = image_batch
    prompt = prompt._replace(mask=prompt.mask.at[1].set(False))

    @functools.partial(jax.jit, static_argnums=0)
    def run(dtype):
        features = policy.with_compute(dtype=dtype).encode_images(params, images)
        return policy.with_compute(dtype=dtype).read_prompt(params, prompt, features)

    exact, _ = run(jnp.float32)
    rough, prefix = run(jnp.bfloat16)
    assert rough.dtype == prefix.k.dtype == jnp.bfloat16
    assert np.isfinite(exact).all() and np.isfinite(rough.astype(np.float32)).all()
    error = jnp.abs(rough[0] - exact[0])
    assert float(jnp.mean(error)) < 0.05 * float(jnp.mean(jnp.abs(exact[0])))


def test_fresh_parameters_are_of_use(policy):
    fresh = jax.jit(policy.init)(jax.random.key(0))
    assert set(fresh) == {"visual", "model"}
    heads = policy.shapes.num_heads * policy.shapes.head_dim
    assert fresh["model"]["layers"]["self_attn"]["q_proj"]["kernel"].shape == (2, 32, heads)
    assert abs(float(jnp.std(fresh["model"]["embed_tokens"]["embedding"])) - 0.02) < 0.002
    assert abs(float(jnp.std(fresh["model"]["layers"]["mlp"]["up_proj"]["kernel"])) - 0.177) < 0.01
    first, second = fresh["visual"]["blocks"]["attn"]["qkv"]["kernel"]
    assert not np.array_equal(first, second)
