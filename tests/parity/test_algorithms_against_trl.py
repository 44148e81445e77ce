"""Advantages and losses beside TRL 1.16.0, and beside the release's own formulas, on random inputs.

TRL's losses are methods of its trainers; they are called here on a stand-in that holds what they
read; where TRL is not installed these are left out. Its advantages, and those of the release, are
lines within longer methods: they are written out again in torch.
"""

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from emor3_jax.rewards.shaping import overlong
from emor3_jax.rl import advantages, entropy, kl, losses, surrogates
from emor3_jax.rl.correction import Correction
from emor3_jax.rl.entropy import EntropyBonus
from emor3_jax.rl.selection import Selection

B, G, T = 5, 4, 9


@pytest.fixture(scope="module")
def draw():
    """Log-probabilities of three policies, lengths and rewards, as numpy."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T + 1, (B, G))
    mask = np.arange(T) < lengths[..., None]
    old = np.where(mask, rng.normal(-2, 1, (B, G, T)), 0)
    new = np.where(mask, old + rng.normal(0, 0.4, (B, G, T)), 0)
    reference = np.where(mask, old + rng.normal(0, 0.4, (B, G, T)), 0)
    rewards = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0], (B, G))
    rewards[0] = 0.3
    arrays = (new, old, reference, rewards, rng.normal(size=(B, G)))
    return mask, *(x.astype(np.float32) for x in arrays)


def of_trl(x: np.ndarray) -> torch.Tensor:
    """One row for each response, as TRL lays them out."""
    return torch.tensor(x.reshape(B * G, *x.shape[2:]))


class _Trainer:
    """What a trainer's `_compute_loss` reads of its trainer."""

    def __init__(self, logprobs: torch.Tensor, **options) -> None:
        self._logprobs = logprobs
        self.aux_loss_enabled = self.use_vllm = self._entropy_bonus_enabled = False
        self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
        self.args = SimpleNamespace(delta=None, use_bias_correction_kl=False)
        self.beta, self.max_completion_length = 0.0, T
        self.model = SimpleNamespace(training=True)
        self.current_gradient_accumulation_steps = 1
        self.args.steps_per_generation = 1
        same = lambda x, **_: x  # noqa: E731
        self.accelerator = SimpleNamespace(
            num_processes=1, gather=same, gather_for_metrics=same, reduce=same
        )
        self._metrics = {"train": defaultdict(list)}
        for name, value in options.items():
            setattr(self, name, value)

    def _get_per_token_logps_and_entropies(self, *_, **__):
        entropies = getattr(self, "entropies", torch.zeros_like(self._logprobs))
        return self._logprobs, entropies, None


def trl_inputs(draw, inputs: dict) -> dict:
    """What TRL's losses take, with these."""
    blank = torch.zeros(B * G, 1, dtype=torch.long)
    ids = torch.zeros(B * G, T, dtype=torch.long)
    whole = {"prompt_ids": blank, "prompt_mask": blank, "completion_ids": ids} | inputs
    whole["completion_mask"] = of_trl(draw[0]).float()
    whole["num_items_in_batch"] = whole["completion_mask"].sum()
    return whole


def trl_loss(trainer_class, draw, inputs: dict, args: dict | None = None, **options):
    """TRL's loss and its gradient by the log-probabilities; `args` are those of the trainer's."""
    logprobs = of_trl(draw[1]).requires_grad_()
    trainer = _Trainer(logprobs, **options)
    vars(trainer.args).update(args or {})
    trainer.get_off_policy_mask = getattr(trainer_class, "get_off_policy_mask", None)
    loss = trainer_class._compute_loss(trainer, None, trl_inputs(draw, inputs))
    loss.backward()
    return loss.detach().numpy(), logprobs.grad.numpy().reshape(B, G, T)


def our_loss(draw, advantage, loss, kl_coef, sampler=None, selected=None):
    """Our loss and its gradient by the log-probabilities."""
    mask, new, old, reference, *_ = draw
    weights = loss.weights(jnp.asarray(mask), jnp.ones((B, G), bool))
    given = surrogates.Tokens(
        jnp.asarray(new),
        old=jnp.asarray(old),
        sampler=jnp.asarray(old if sampler is None else sampler),
        selected=selected,
        ref=jnp.asarray(reference),
        advantages=jnp.asarray(advantage),
        weights=weights,
    )
    return jax.value_and_grad(lambda x: loss(given._replace(logprobs=x), kl_coef)[0])(
        given.logprobs
    )


@pytest.mark.parametrize(
    ("loss_type", "mean", "level", "ratio"),
    [
        ("grpo", "seq", "token", "clip"),
        ("bnpo", "token", "token", "clip"),
        ("dapo", "token", "token", "clip"),
        ("dr_grpo", "constant", "token", "clip"),
        ("grpo", "seq", "sequence", "gspo"),
    ],
)
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_grpo_losses(draw, compare, loss_type, mean, level, ratio, beta):
    trl = pytest.importorskip("trl")
    _, _, old, reference, _, advantage = draw
    inputs = {
        "advantages": of_trl(advantage),
        "old_per_token_logps": of_trl(old),
        "ref_per_token_logps": of_trl(reference),
    }
    clips = {"epsilon_low": 0.2, "epsilon_high": 0.28}
    wanted = trl_loss(
        trl.GRPOTrainer,
        draw,
        inputs,
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        **clips,
    )
    surrogate = surrogates.SURROGATES[ratio](0.2, 0.28, float("inf"))
    found = our_loss(draw, advantage, losses.PolicyLoss(surrogate, mean=mean), beta)
    case = f"TRL loss {loss_type}, ratio of a {level}, beta {beta}"
    compare(case, found[0], wanted[0], 1e-6)
    compare(f"{case}: gradient", found[1], wanted[1], 1e-6)


def test_two_sided_clip(draw, compare):
    """TRL's `delta` bounds the ratio of bad responses as the dual clip does."""
    trl = pytest.importorskip("trl")
    mask, new, old, *_, advantage = draw
    far = mask, np.where(mask, old + 3 * (new - old), 0).astype(np.float32), *draw[2:]
    inputs = {"advantages": of_trl(advantage), "old_per_token_logps": of_trl(old)}
    options = {"epsilon_low": 0.2, "epsilon_high": 0.3, "loss_type": "bnpo"}
    wanted = trl_loss(
        trl.GRPOTrainer, far, inputs, {"delta": 2.0}, importance_sampling_level="token", **options
    )
    found = our_loss(far, advantage, losses.PolicyLoss(surrogates.Clip(clip_dual=2.0)), 0.0)
    for name, a, b in zip(("loss", "gradient"), found, wanted, strict=True):
        compare(f"TRL two-sided clip: {name}", a, b, 1e-6)


def compare_both(compare, case, found, wanted):
    for name, a, b in zip(("loss", "gradient"), found, wanted, strict=True):
        compare(f"TRL {case}: {name}", a, b, 1e-6)


@pytest.mark.parametrize(
    ("kind", "mean", "surrogate", "args"),
    [
        # TRL's upper bound is that of the ratio itself.
        ("cispo", "token", surrogates.Cispo(1.0, 0.28), {}),
        (
            "sapo",
            "seq",
            surrogates.Sapo(1.0, 1.05),
            {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
        ),
    ],
)
def test_other_surrogates(draw, compare, kind, mean, surrogate, args):
    trl = pytest.importorskip("trl")
    *_, old, reference, _, advantage = draw
    inputs = {
        "advantages": of_trl(advantage),
        "old_per_token_logps": of_trl(old),
        "ref_per_token_logps": of_trl(reference),
    }
    options = {"loss_type": kind, "importance_sampling_level": "token", "beta": 0.05}
    bounds = {"epsilon_low": 0.2, "epsilon_high": 1.28}
    wanted = trl_loss(trl.GRPOTrainer, draw, inputs, args, **options, **bounds)
    found = our_loss(draw, advantage, losses.PolicyLoss(surrogate, mean=mean), 0.05)
    compare_both(compare, kind, found, wanted)


def test_gmpo(draw, compare):
    gmpo = pytest.importorskip("trl.experimental.gmpo")
    *_, old, _, _, advantage = draw
    inputs = {"advantages": of_trl(advantage), "old_per_token_logps": of_trl(old)}
    wanted = trl_loss(gmpo.GMPOTrainer, draw, inputs, epsilon_low=0.3, epsilon_high=0.4)
    loss = losses.PolicyLoss(surrogates.Gmpo(0.3, 0.4), mean="seq", kl="off")
    compare_both(compare, "gmpo", our_loss(draw, advantage, loss, 0.0), wanted)


CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.3, "importance_sampling_level": "token"}


def test_deepseek_mask_and_kl(draw, compare):
    trl = pytest.importorskip("trl")
    mask, new, old, reference, _, advantage = draw
    # Bad responses are far off the sampler's policy, on both sides of the threshold.
    rng = np.random.default_rng(2)
    moved = rng.choice([-0.4, 0.0, 0.4], (B, G, 1))
    sampler = np.where(mask, new + moved, 0).astype(np.float32)
    inputs = {
        "advantages": of_trl(advantage),
        "old_per_token_logps": of_trl(old),
        "sampling_per_token_logps": of_trl(sampler),
        "ref_per_token_logps": of_trl(reference),
    }
    wanted = trl_loss(
        trl.GRPOTrainer,
        draw,
        inputs,
        {"use_bias_correction_kl": True},
        loss_type="bnpo",
        beta=0.05,
        off_policy_mask_threshold=0.2,
        **CLIP,
    )
    clip = surrogates.Clip(0.2, 0.3, float("inf"))
    loss = losses.PolicyLoss(clip, kl_ratio=True, off_policy=0.2)
    found = our_loss(draw, advantage, loss, 0.05, sampler)
    compare_both(compare, "off-policy mask, KL times ratio", found, wanted)
    assert 0 < np.mean((advantage < 0) & (moved[..., 0] > 0)) < 1


@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
def test_correction_of_the_mismatch(draw, compare, mode):
    """The weights are lines within a method of TRL: written out again in torch."""
    trl = pytest.importorskip("trl")
    mask, _, old, _, _, advantage = draw
    rng = np.random.default_rng(3)
    sampler = np.where(mask, old + rng.normal(0, 0.5, old.shape), 0).astype(np.float32)
    gap = of_trl((old - sampler) * mask)
    if mode.startswith("sequence"):
        gap = gap.sum(-1, keepdim=True)
    weight, low, high = gap.exp(), 0.5, 1.5
    if mode.endswith("truncate"):
        weight = weight.clamp(low, high)
    else:
        weight = torch.where((weight < low) | (weight > high), 0.0, weight)
    inputs = {
        "advantages": of_trl(advantage),
        "old_per_token_logps": of_trl(old),
        "importance_sampling_ratio": weight,
    }
    options = {"use_vllm": True, "vllm_importance_sampling_correction": True}
    wanted = trl_loss(trl.GRPOTrainer, draw, inputs, loss_type="bnpo", **CLIP, **options)
    loss = losses.PolicyLoss(
        surrogates.Clip(0.2, 0.3, float("inf")), kl="off", correction=Correction(mode, low, high)
    )
    compare_both(compare, mode, our_loss(draw, advantage, loss, 0.0, sampler), wanted)


def test_the_tokens_of_highest_entropy(draw, compare):
    trl = pytest.importorskip("trl")
    mask, _, old, _, _, advantage = draw
    entropy = np.random.default_rng(4).uniform(0, 3, old.shape).astype(np.float32)
    inputs = {"advantages": of_trl(advantage), "old_per_token_logps": of_trl(old)}
    selection = Selection("top_entropy", 0.2)
    chosen = selection(jnp.asarray(mask), old, advantage, jnp.asarray(entropy), None)
    cut = np.sort(entropy[mask])[-int(0.2 * mask.sum())]
    wanted = trl_loss(
        trl.GRPOTrainer,
        draw,
        inputs,
        loss_type="bnpo",
        top_entropy_quantile=0.2,
        # TRL interpolates between two tokens.
        get_high_entropy_mask=lambda entropies, mask, _: (entropies >= cut) & mask.bool(),
        entropies=of_trl(entropy),
        **CLIP,
    )
    loss = losses.PolicyLoss(surrogates.Clip(0.2, 0.3, float("inf")), kl="off", selection=selection)
    found = our_loss(draw, advantage, loss, 0.0, selected=chosen)
    compare_both(compare, "tokens of highest entropy", found, wanted)


def test_the_entropy_bonus(draw, compare):
    """Over steps of random entropies, above and below the target; one trainer adapts its weight."""
    trl = pytest.importorskip("trl")
    mask, new, old, _, _, advantage = draw
    inputs = {"advantages": of_trl(advantage), "old_per_token_logps": of_trl(old)}
    plain, _ = trl_loss(trl.GRPOTrainer, draw, inputs, loss_type="bnpo", **CLIP)
    trainer = _Trainer(
        of_trl(new),
        loss_type="bnpo",
        use_adaptive_entropy=True,
        _entropy_bonus_enabled=True,
        entropy_coef=0.001,
        _last_world_entropy=0.0,
        _entropy_window_stats=None,
        **CLIP,
    )
    trainer.args.entropy_target, trainer.args.entropy_coef_delta = 0.2, 0.005
    trainer.args.entropy_coef_min, trainer.args.entropy_coef_max = 0.0, 0.012
    trainer.accelerator.sync_gradients = True
    rng, bonus, found, wanted = np.random.default_rng(5), EntropyBonus(0.001, 0.001), [], []
    for most in (0.1, 0.2, 0.3, 0.9, 0.8, 0.7, 0.9, 0.1, 0.2):
        entropies = rng.uniform(0, most, old.shape).astype(np.float32)
        trainer.entropies = of_trl(entropies)
        loss = trl.GRPOTrainer._compute_loss(trainer, None, trl_inputs(draw, inputs))
        wanted.append(loss.numpy() - plain)
        mean = entropies[mask].mean()
        found.append(-bonus.applied * mean)
        bonus = entropy.adapt(bonus, mean, target=0.2, delta=0.005, most=0.012)
    assert sum(x == 0 for x in found) == 4
    compare("TRL's entropy bonus and its weight over steps", np.float32(found), wanted, 1e-6)


def test_gdpo_advantages(draw, compare):
    """TRL's "normalize_then_sum", lines within a method: written out again in torch."""
    rewards = draw[4]
    terms = {"right": rewards, "formed": np.roll(rewards, 1, axis=0) ** 2}
    weights, epsilon = {"right": 0.8, "formed": 0.2}, 1e-4
    total = torch.zeros(B, G)
    for name, weight in weights.items():
        each = torch.tensor(terms[name])
        mean, std = each.mean(1, keepdim=True), each.std(1, keepdim=True)
        # Where all are equal, a rounding error of the mean is all that these have.
        scaled = torch.where(std > 1e-6, (each - mean) / (std + epsilon), 0.0)
        total += weight * scaled
    wanted = (total - total.mean()) / (total.std() + epsilon)
    given = advantages.RewardTerms(
        jnp.zeros((B, G)), {name: jnp.asarray(x) for name, x in terms.items()}, weights
    )
    found = advantages.gdpo(given, std="sample", epsilon=epsilon)
    compare("TRL's GDPO advantage", found, wanted.numpy(), 1e-5)


def test_overlong_penalty(compare):
    rewards = pytest.importorskip("trl.rewards")
    lengths = np.arange(1, 41)
    ids = [[0] * int(n) for n in lengths]
    wanted = rewards.get_soft_overlong_punishment(40, 12)(completion_ids=ids)
    compare("TRL over-long penalty", overlong(lengths, limit=40, buffer=12), wanted, 1e-6)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_grpo_advantages(draw, compare, scale):
    """The sample deviation, as TRL 1.16.0 with its epsilon 1e-4 and the release with 1e-6."""
    rewards = torch.tensor(draw[4])
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    for name, epsilon in (("TRL", 1e-4), ("the release", 1e-6)):
        if scale == "none":
            wanted, found = centred, advantages.dr_grpo(jnp.asarray(draw[4]))
        else:
            wanted = centred / (rewards.std(dim=1, keepdim=True) + epsilon)
            found = advantages.grpo(jnp.asarray(draw[4]), std="sample", epsilon=epsilon)
        # Where all are equal, a rounding error of the mean is all that these have.
        useful = draw[4].max(axis=1) > draw[4].min(axis=1)
        compare(
            f"{name}'s advantage, scaled by {scale}", found[useful], wanted.numpy()[useful], 2e-6
        )


def test_rloo_advantages(draw, compare):
    """As TRL 1.16.0, the KL of a response in its reward; and as the release's `rloo`."""
    mask, _, old, reference, rewards, _ = draw
    each, _ = kl.penalty("k1", jnp.asarray(old), jnp.asarray(reference), jnp.asarray(mask))
    found = advantages.rloo(jnp.asarray(rewards) - 0.05 * each)
    per_token = torch.tensor(old) - torch.tensor(reference)
    grouped = torch.tensor(rewards) - 0.05 * (per_token * torch.tensor(mask)).sum(-1)
    baselines = (grouped.sum(dim=1, keepdim=True) - grouped) / (G - 1)
    compare("RLOO advantage, KL in the reward", found, (grouped - baselines).numpy(), 2e-6)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl"), ("abs", "abs")]
)
def test_kl_estimates_of_the_release(draw, compare, ours, theirs):
    rng = np.random.default_rng(1)
    # Differences beyond the clamps too.
    new, reference = (rng.normal(0, 12, 400).astype(np.float32) for _ in range(2))
    policy, other = torch.tensor(new), torch.tensor(reference)
    wanted = {
        "kl": policy - other,
        "abs": (policy - other).abs(),
        "mse": 0.5 * (policy - other).square(),
    }
    difference = (other - policy).clamp(-20.0, 20.0)
    wanted["low_var_kl"] = (difference.exp() - difference - 1).clamp(-10.0, 10.0)
    found = kl.ESTIMATES[ours](jnp.asarray(new), jnp.asarray(reference))
    scale = float(wanted[theirs].abs().max())
    compare(f"KL {ours}, the release's {theirs}", found, wanted[theirs].numpy(), 1e-6, scale)
