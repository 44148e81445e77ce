"""Surrogates: policy-gradient objectives per token, which differ in what bounds a step.

With `r = π / π_old` the ratio of a sampled token, `A` its response's advantage, `p_i` and `q_i` the
geometric means of a response's token probabilities under π and π_old, and `sg` no gradient:

| name | class | loss of a token | paper |
|---|---|---|---|
| clip | `Clip` | `max(-A r, -A clip(r))`, at most `-A clip_dual` for a bad one | GRPO, 2402.03300 |
| gspo | `SequenceRatio` | the same with `p_i / q_i` | GSPO, 2507.18071 |
| gepo | `GroupRatio` | the same with `p_i / (Σ q_j² / Σ q_j)` over the group | GEPO, 2508.17850 |
| cispo | `Cispo` | `-sg(clip(r)) A log π` | MiniMax-M1, 2506.13585 |
| sapo | `Sapo` | `-A (4 / τ) σ(τ (r - 1))` | SAPO, 2511.20347 |
| gmpo | `Gmpo` | `-A exp(mean of clipped log r)` | GMPO, 2507.20673 |
| dppo_tv, dppo_kl | `DppoTv`, `DppoKl` | `-sg(r) A log π` within a band of π | DPPO, 2602.04879 |
| ipo | `Ipo` | the same, on both sides of the band | prime-rl |
"""

from emor3_jax.rl.surrogates.cispo import Cispo
from emor3_jax.rl.surrogates.clip import Clip
from emor3_jax.rl.surrogates.gepo import GroupRatio
from emor3_jax.rl.surrogates.gmpo import Gmpo
from emor3_jax.rl.surrogates.gspo import SequenceRatio
from emor3_jax.rl.surrogates.sapo import Sapo
from emor3_jax.rl.surrogates.tokens import Metrics, Surrogate, Tokens
from emor3_jax.rl.surrogates.trust_region import DppoKl, DppoTv, Ipo

__all__ = [
    "SURROGATES",
    "Cispo",
    "Clip",
    "DppoKl",
    "DppoTv",
    "Gmpo",
    "GroupRatio",
    "Ipo",
    "Metrics",
    "Sapo",
    "SequenceRatio",
    "Surrogate",
    "Tokens",
]

SURROGATES: dict[str, type[Surrogate]] = {
    "clip": Clip,
    "gspo": SequenceRatio,
    "gepo": GroupRatio,
    "cispo": Cispo,
    "sapo": Sapo,
    "gmpo": Gmpo,
    "dppo_tv": DppoTv,
    "dppo_kl": DppoKl,
    "ipo": Ipo,
}
"""Name in the config → surrogate, constructed from its `fields`."""
