"""The config of every program: all fields with their defaults, and the checks before any compile.

A file in `configs/` starts from `default()` and sets what differs. `--config.key=value` overrides
on the command line; an unknown key is an error that names the nearest one (`ml_collections`).
"""

import math
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from emor3_jax.data.prompts import PLAIN_STYLES
from emor3_jax.models import is_hub_id
from emor3_jax.models.lora import TOWER
from emor3_jax.models.qwen2_5_vl.attention import BACKENDS
from emor3_jax.rewards.patterns import PatternError
from emor3_jax.rewards.terms import Term, TermError, make_term
from emor3_jax.rl.advantages import ESTIMATORS
from emor3_jax.rl.kl import ESTIMATES
from emor3_jax.rl.losses import MEANS, RATIOS

EMBEDDED = "embedded"
"""`policy.path` of the base policy that the package trains itself, without any download."""


class ConfigError(ValueError):
    """A field of the config is wrong: names the field, its value, the rule and the way out."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(f"config.{field}={value!r}: {rule}")


def dataset(**fields: object) -> ConfigDict:
    """Returns the description of one data set; `fields` override the defaults."""
    config = ConfigDict()
    # "emoscenes", drawn by the package; "parquet", files in the release's schema; a named data set
    # in the folder that its authors publish (emoset, emotion6, webemo, fi, artphoto, abstract,
    # fer2013); or "folders", "jsonl", "huggingface" (docs/data.md).
    config.kind = "emoscenes"
    # Folder or file; for parquet a path, a glob, or several joined by commas.
    config.path = ""
    # Which rows, where the data set has splits: train, validation, test, whole; emoscenes also has
    # pretrain, shifted_pretrain and shifted_test.
    config.split = "train"
    # A label set by name (mikels8, emotion6, fer7, webemo25, webemo6, polarity2, arousal2), or
    # labels joined by commas. "" takes the data set's own; of parquet and jsonl, mikels8.
    config.labels = ""
    # Asked of every picture instead of the data set's own question; "" asks that.
    config.question = ""
    # Named data sets: copy the pictures into the records that are built (data/datasets/base.py).
    config.copy = False
    # Only so many rows, as many of each label, drawn by the run's seed; 0 takes all. Their ids are
    # kept in workdir/subsets.
    config.subset = 0
    # Only the rows that this file names, one id a line.
    config.ids = ""
    # In training: "class" gives each label equal turns.
    config.balance = ""
    # In training: the share of rows from this data set, relative to the others of `data.mix`.
    config.weight = 1.0
    # Beyond the method: an answer is worth its label's share among raters, over the largest share
    # (docs/method.md); the rows must have a `distribution`.
    config.graded = False
    # Evaluation reads at most so many rows; 0 reads all.
    config.limit = 0
    return _updated(config, fields)


def reward_term(**fields: object) -> ConfigDict:
    """Returns the description of one reward term; give its weight and one of the three kinds."""
    config = ConfigDict()
    config.weight = 0.1
    # A regular expression: 1 where it matches the response, else 0.
    config.pattern = ""
    # "module:name" of a jitted function: `rewards.Group` → float32[B, G].
    config.function = ""
    # "module:name" of a function in plain Python: (response, label) → a number. Slow.
    config.text = ""
    return _updated(config, fields)


def _updated(config: ConfigDict, fields: dict[str, object]) -> ConfigDict:
    """Returns a description with fields of it changed; an unknown one is a `KeyError`."""
    config.lock()
    config.update(fields)
    return config.unlock()


def default() -> ConfigDict:
    """Returns the defaults: the paper's method at the release's settings."""
    config = ConfigDict()
    config.seed = 0
    # Optimisation steps; each rolls out `rollout.prompts` prompts.
    config.steps = 100
    # "paper" or "release": the two versions of the method (docs/method.md).
    config.profile = "paper"

    config.policy = ConfigDict()
    # A Hugging Face folder; an id on the hub, "owner/name" or "owner/name@revision"; or "embedded".
    config.policy.path = EMBEDDED
    # Where the embedded base policy is kept, and trained first if it is not there.
    config.policy.embedded_folder = "runs/base_policy"
    # Type of the layers' arithmetic; master weights, norms and softmax are float32. What bfloat16
    # changes in log-probabilities: docs/results/precision.md.
    config.policy.dtype = "bfloat16"
    # "xla", "splash" (TPU), "cudnn" (NVIDIA GPU), or "auto": the one of the platform.
    config.policy.attention = "auto"
    config.policy.freeze_vision_tower = False
    # Train adapters of this rank alone (models/lora.py), in these modules: those of the decoder by
    # name, those of the vision tower as "visual/qkv". 0 trains the weights themselves.
    config.policy.lora_rank = 0
    config.policy.lora_alpha = 32.0
    config.policy.lora_modules = ("q_proj", "k_proj", "v_proj", "o_proj")

    config.data = ConfigDict()
    config.data.train = dataset()
    # Name → data set: further training sets, mixed with `data.train` by their weights and put into
    # its labels.
    config.data.mix = ConfigDict()
    # Where emoscenes and the named data sets are built.
    config.data.folder = "runs/data"
    # Side of the drawn scenes in pixels, 112 to 224.
    config.data.scene_size = 112
    # Padded prompt lengths and numbers of attention windows; a batch takes the smallest that fits.
    config.data.prompt_lengths = (512, 1024, 2048)
    config.data.image_windows = (64, 128, 256, 350)
    # Pictures are scaled to have between so many pixels; 0 keeps what the policy's folder says.
    config.data.min_pixels = 0
    config.data.max_pixels = 0
    # Processes that decode images; 0 does it in the training process.
    config.data.workers = 0
    # Rows that are decoded while a step is computed, up to a batch of them; a picture takes up to
    # 100 MB until it is used.
    config.data.read_ahead = 64
    # Training batches of pictures of like size, which need less padding.
    config.data.sort_by_size = False
    # Of a prompt over the largest length: "drop" the row, or "cut" the end of its question.
    config.data.long_prompts = "drop"
    # Template files, or a built-in set by name: "qwen" or "tiny"; for `set` also "think", "direct"
    # and "tiny_direct", which have no steps (docs/data.md).
    config.data.templates = ConfigDict()
    config.data.templates.set = "qwen"
    config.data.templates.coherence = "qwen"
    config.data.templates.consistency = "qwen"

    config.rollout = ConfigDict()
    # B, prompts a step, and G, responses to each.
    config.rollout.prompts = 512
    config.rollout.responses = 8
    config.rollout.max_tokens = 2048
    # Prompts in flight at once, each with its G responses; 0 is all of them. As groups end,
    # `refill` prompts leave and others enter; both must divide (docs/engine.md).
    config.rollout.slots = 0
    config.rollout.refill = 0
    # Tokens that are decoded between two looks at what has ended, and the smallest cache.
    config.rollout.block = 128
    # How often the batch may be halved once no prompt waits, in prompts and in responses; those
    # also stop between two halves.
    config.rollout.halvings = 2
    # Decode without a loop over the layers: faster on CPU in bfloat16 (docs/engine.md).
    config.rollout.unroll = False
    # DAPO's dynamic sampling: further batches a step may draw to replace prompts whose rewards are
    # all equal; then it goes on with what it has. 0 keeps every prompt.
    config.rollout.resample = 0
    config.rollout.temperature = 1.0
    config.rollout.top_p = 1.0

    config.reflect = ConfigDict()
    # False is plain GRPO: no reflection is asked, and its weight goes as the profile says.
    config.reflect.enabled = True
    # Beyond the method: score replies by their likelihood, in one pass, instead of sampling one.
    config.reflect.soft = False
    config.reflect.temperature = 0.6
    config.reflect.top_p = 0.95
    # Replies are cut at so many tokens; a label and the end of sequence must fit.
    config.reflect.max_tokens = 8
    # Padded lengths of the judged text; a batch takes the smallest that fits its longest text.
    config.reflect.text_lengths = (128, 512, 2048)

    config.reward = ConfigDict()
    # "label", or "answer": coherence against the response's own boxed answer (paper, Figure 2).
    config.reward.coherence_target = "label"
    config.reward.lambda_reflect = 0.1
    config.reward.lambda_format = 0.1
    # What the format score asks for: "set", the three steps and the box; or "boxed", the box alone.
    config.reward.format = "set"
    # What stands for the reflection in the reward: "both", "coherence" or "consistency".
    config.reward.reflection = "both"
    # DAPO's soft over-long penalty, times its weight: grows over the last so many of
    # `rollout.max_tokens`; 0 is none.
    config.reward.overlong = 0
    config.reward.overlong_weight = 1.0
    # Name → `reward_term(…)`: terms of one's own, added with their weights.
    config.reward.terms = ConfigDict()
    # Folder of reward tables, shared by runs; "" keeps none.
    config.reward.table_cache = "runs/reward_tables"

    config.policy_update = ConfigDict()
    config.policy_update.prompts = 256
    # Prompts whose activations are in memory at once.
    config.policy_update.micro_prompts = 8
    config.policy_update.learning_rate = 2e-6
    # Updates over which the learning rate rises to its value.
    config.policy_update.warmup_steps = 0
    # "constant", or "linear": falls to 0 at the last of `steps`.
    config.policy_update.schedule = "constant"
    # Factors of the learning rate for groups of parameters.
    config.policy_update.rates = ConfigDict()
    config.policy_update.rates.tower = 1.0
    config.policy_update.rates.merger = 1.0
    config.policy_update.rates.embedding = 1.0
    config.policy_update.rates.decoder = 1.0
    config.policy_update.weight_decay = 1e-2
    config.policy_update.max_grad_norm = 1.0
    # "grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline" or "remax", which answers
    # each prompt once more, greedily (rl/advantages.py).
    config.policy_update.advantage = "grpo"
    # "token", "sequence" (GSPO) or "group" (GEPO), see rl/losses.py.
    config.policy_update.ratio = "token"
    # A `clip_low` of 1 and infinite others clip nothing.
    config.policy_update.clip_low = 0.2
    config.policy_update.clip_high = 0.3
    config.policy_update.clip_dual = 3.0
    # "token": mean over all response tokens; "seq": within each response first; "constant": each
    # token weighs 1 / `rollout.max_tokens` of its response.
    config.policy_update.mean = "token"
    # Leave responses that were cut off at `rollout.max_tokens` out of the loss (DAPO).
    config.policy_update.mask_truncated = False
    # Estimate of the KL to the reference: "k1", "k2", "k3", "abs" or "off" (rl/kl.py), and whether
    # it is a term of the "loss" or is taken off the "reward".
    config.policy_update.kl = "k3"
    config.policy_update.kl_place = "loss"
    # Its weight; where `kl_target`, in nats a token, is over 0, the weight at the start. It then
    # changes by up to a fifth in `kl_horizon` responses to come to that target.
    config.policy_update.kl_coef = 1e-2
    config.policy_update.kl_target = 0.0
    config.policy_update.kl_horizon = 10_000.0
    # "sampler": the behaviour policy's log-probabilities are those that sampling recorded;
    # "recompute": they are computed again before the first update, `policy/sampler_gap` apart.
    config.policy_update.old_logprobs = "sampler"
    # What the backward pass recomputes: "none", "activations" or "layers", from fast to small.
    config.policy_update.remat = "layers"
    # Short responses of a group share a row, where attention is "xla".
    config.policy_update.pack = True
    # Report `policy/entropy`, for one more pass over the logits.
    config.policy_update.entropy = False
    # Tokens whose logits exist at once.
    config.policy_update.logprob_chunk = 1024
    # Padded response lengths of scoring and update; a batch takes the smallest that fits.
    config.policy_update.response_lengths = (256, 512, 1024, 2048)

    # The policy that the KL is measured from.
    config.reference = ConfigDict()
    # "frozen"; "refresh", the policy itself every so many steps; "average", of which each step
    # keeps the share `decay`; or "none", for a policy update without KL.
    config.reference.kind = "frozen"
    config.reference.every = 50
    config.reference.decay = 0.99
    # How its matrices are kept: "float32", "bfloat16", or "" for policy.dtype, which changes
    # nothing; what is averaged, or the base of adapters, then stays in float32.
    config.reference.dtype = ""
    # Bytes on the host for the features of its pictures, kept over epochs; 0 keeps none.
    config.reference.image_cache = 0

    # Supervised fine-tuning (`emor3_jax.sft`); everything else of it is in the other sections.
    config.sft = ConfigDict()
    # "label": the boxed label alone; "response": what each row says itself, at most so many of it.
    config.sft.target = "label"
    config.sft.responses = 4

    config.evaluate = ConfigDict()
    # Name → data set; the first one is watched during training.
    config.evaluate.sets = ConfigDict()
    # Steps between evaluations of the first set, on `evaluate.during` of its rows.
    config.evaluate.every = 50
    config.evaluate.during = 200
    config.evaluate.prompts = 64
    # 0 is greedy.
    config.evaluate.temperature = 0.0
    config.evaluate.top_p = 1.0
    # Responses to each row; the label that most of them box is its answer.
    config.evaluate.votes = 1
    # The program evaluates the policy of a run's checkpoint instead of `policy.path`, which it must
    # have started from: "runs/demo" (the newest) or "runs/demo/checkpoints/40".
    config.evaluate.checkpoint = ""
    # Ask both reflections here even where `reflect.enabled` is false, for the metrics of reasoning.
    config.evaluate.reflect = False

    config.mesh = ConfigDict()
    # Sizes of the mesh axes; -1 is "the rest".
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 1

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 50
    config.checkpoint.keep = 2

    config.log = ConfigDict()
    # Steps to trace for the JAX profiler, from the third of this start on, into workdir/profile.
    config.log.profile_steps = 0
    # Steps between progress lines and between sheets of samples under workdir/samples.
    config.log.every = 1
    config.log.samples_every = 25
    # Folder of compiled programs, shared by runs; "" keeps none.
    config.log.compile_cache = "runs/compile_cache"
    return config


def base_policy() -> ConfigDict:
    """Returns the defaults: a policy of 2.1 million parameters on EmoScenes."""
    config = ConfigDict()
    config.seed = 0
    # "emoscenes", or "faces": the parquet files of `data.path`, as `configs/fer2013.py` reads.
    config.data = ConfigDict()
    config.data.kind = "emoscenes"
    config.data.folder = "runs/data"
    config.data.path = ""
    # Images to learn from, drawn by the seed.
    config.data.limit = 8000
    # Side of an image in pixels, a multiple of 28; its tokens are (side / 28) squared.
    config.data.size = 112

    config.model = ConfigDict()
    config.model.vocab_size = 1200
    config.model.vision_width = 128
    config.model.vision_layers = 3
    config.model.width = 192
    config.model.layers = 3
    config.model.heads = 6
    config.model.kv_heads = 2

    config.steps = 380
    config.batch = 32
    config.learning_rate = 2e-3
    config.warmup_steps = 30
    config.weight_decay = 0.02
    # Folder of compiled programs; "" keeps none.
    config.compile_cache = "runs/compile_cache"
    return config


def validate(config: ConfigDict) -> None:
    """Checks what can be checked without loading anything, before any compile.

    Raises:
      ConfigError: naming the field, its value, the rule and the way out.
    """

    def need(ok: bool, field: str, rule: str) -> None:
        if not ok:
            value = config
            for key in field.split("."):
                value = value[key]
            raise ConfigError(field, value, rule)

    need(config.steps >= 0, "steps", "must be 0 or more")
    need(config.profile in ("paper", "release"), "profile", "must be 'paper' or 'release'")
    dtypes = ("float32", "bfloat16")
    need(config.policy.dtype in dtypes, "policy.dtype", f"must be one of {dtypes}")
    backends = ("auto", *BACKENDS)
    need(config.policy.attention in backends, "policy.attention", f"must be one of {backends}")
    need(
        config.policy.attention != "cudnn" or config.policy.dtype == "bfloat16",
        "policy.attention",
        "cuDNN has no kernel for float32; set policy.dtype=bfloat16, or attention to 'xla'",
    )
    if config.policy.path != EMBEDDED:
        path = Path(config.policy.path)
        need(
            (path / "config.json").is_file()
            or (not path.exists() and is_hub_id(config.policy.path)),
            "policy.path",
            "must be a Hugging Face folder with a config.json, an id on the hub ('owner/name'), or "
            "'embedded'",
        )
    for name in ("data.min_pixels", "data.max_pixels"):
        need(config.data[name.split(".")[1]] >= 0, name, "must be 0 or more")
    need(config.data.read_ahead >= 1, "data.read_ahead", "must be at least 1")
    rules = ("drop", "cut")
    need(config.data.long_prompts in rules, "data.long_prompts", f"must be one of {rules}")
    trained = {"data.train": config.data.train}
    trained |= {f"data.mix.{name}": each for name, each in config.data.mix.items()}
    for field, each in trained.items():
        need(each.balance in ("", "class"), f"{field}.balance", "must be 'class', or '' for none")
        need(each.weight > 0, f"{field}.weight", "must be over 0")
        same = each.graded == config.data.train.graded
        need(same, f"{field}.graded", "must be that of data.train: rewards are graded or not")
    for name in config.data.mix:
        need("/" not in name and name != "train", "data.mix", "names hold no '/', nor are 'train'")
    size = config.data.scene_size
    need(112 <= size <= 224, "data.scene_size", "must lie between 112 and 224 pixels")
    for field in ("data.prompt_lengths", "data.image_windows", "reflect.text_lengths"):
        _need_buckets(config, field)
    _need_buckets(config, "policy_update.response_lengths")
    for name in ("rollout.prompts", "rollout.responses", "rollout.max_tokens"):
        need(config.rollout[name.split(".")[1]] >= 1, name, "must be at least 1")
    need(config.rollout.temperature > 0, "rollout.temperature", "must be over 0 to explore")
    for section in ("rollout", "reflect", "evaluate"):
        need(config[section].temperature >= 0, f"{section}.temperature", "must be 0 or more")
        need(0 < config[section].top_p <= 1, f"{section}.top_p", "must lie in (0, 1]")
    need(config.reflect.max_tokens >= 1, "reflect.max_tokens", "must be at least 1")
    rollout = config.rollout
    need(rollout.block >= 1, "rollout.block", "must be at least 1")
    need(rollout.halvings >= 0, "rollout.halvings", "must be 0 or more")
    slots = rollout.slots or rollout.prompts
    need(
        0 <= rollout.slots <= rollout.prompts,
        "rollout.slots",
        f"must be 0 (all) to rollout.prompts={rollout.prompts}",
    )
    refill = rollout.refill or slots
    need(
        rollout.refill >= 0 and slots % refill == 0 and rollout.prompts % refill == 0,
        "rollout.refill",
        f"must be 0 (all slots) or divide both the {slots} slots and rollout.prompts="
        f"{rollout.prompts}",
    )
    need(
        config.profile != "release" or config.rollout.responses >= 2,
        "rollout.responses",
        "profile='release' divides by the sample standard deviation and needs at least 2",
    )
    need(
        config.reward.coherence_target in ("label", "answer"),
        "reward.coherence_target",
        "must be 'label' or 'answer'",
    )
    weights = config.reward.lambda_reflect + config.reward.lambda_format
    need(
        min(config.reward.lambda_reflect, config.reward.lambda_format) >= 0 and weights <= 1,
        "reward.lambda_reflect",
        "the weights must not be negative, nor be over 1 with reward.lambda_format",
    )
    reward_terms(config)
    update = config.policy_update
    need(
        update.prompts >= 1 and config.rollout.prompts % update.prompts == 0,
        "policy_update.prompts",
        f"must divide rollout.prompts={config.rollout.prompts}",
    )
    need(
        update.micro_prompts >= 1 and update.prompts % update.micro_prompts == 0,
        "policy_update.micro_prompts",
        f"must divide policy_update.prompts={update.prompts}",
    )
    need(update.learning_rate > 0, "policy_update.learning_rate", "must be over 0")
    schedules = ("constant", "linear")
    need(update.schedule in schedules, "policy_update.schedule", f"must be one of {schedules}")
    need(0 <= update.clip_low <= 1, "policy_update.clip_low", "must lie in [0, 1]")
    need(update.clip_high >= 0, "policy_update.clip_high", "must be 0 or more")
    need(update.clip_dual > 1, "policy_update.clip_dual", "must be over 1; inf is none")
    _check_algorithm(config, need)
    _check_reference(config, need)
    remats = ("none", "activations", "layers")
    need(update.remat in remats, "policy_update.remat", f"must be one of {remats}")
    sources = ("sampler", "recompute")
    need(update.old_logprobs in sources, "policy_update.old_logprobs", f"must be one of {sources}")
    need(config.log.profile_steps >= 0, "log.profile_steps", "must be 0 or more")
    for name in ("evaluate.every", "checkpoint.every", "log.every", "log.samples_every"):
        section, key = name.split(".")
        need(config[section][key] >= 1, name, "must be at least 1")
    need(config.checkpoint.keep >= 1, "checkpoint.keep", "must be at least 1")
    need(config.evaluate.prompts >= 1, "evaluate.prompts", "must be at least 1")
    need(config.evaluate.votes >= 1, "evaluate.votes", "must be at least 1")
    need(
        config.evaluate.votes == 1 or config.evaluate.temperature > 0,
        "evaluate.votes",
        "at evaluate.temperature=0 all responses to a row are the same; raise it, or ask once",
    )


def _check_algorithm(config: ConfigDict, need: Callable[[bool, str, str], None]) -> None:
    """Checks the choices that make an algorithm, and that they go together."""
    update, responses = config.policy_update, config.rollout.responses
    choices = {
        "policy_update.advantage": (update.advantage, tuple(ESTIMATORS)),
        "policy_update.ratio": (update.ratio, RATIOS),
        "policy_update.mean": (update.mean, MEANS),
        "policy_update.kl": (update.kl, (*ESTIMATES, "off")),
        "policy_update.kl_place": (update.kl_place, ("loss", "reward")),
        "reward.format": (config.reward.format, ("set", "boxed")),
        "reward.reflection": (config.reward.reflection, ("both", "coherence", "consistency")),
    }
    for field, (value, known) in choices.items():
        need(value in known, field, f"must be one of {', '.join(map(repr, known))}")

    least = ESTIMATORS[update.advantage].responses
    need(
        responses >= least,
        "policy_update.advantage",
        f"compares the responses of a group and needs at least {least}, but rollout.responses="
        f"{responses}; raise it, or take 'reinforce_pp' or 'remax'",
    )
    of_response = update.ratio != "token"
    need(
        not of_response or update.mean == "seq",
        "policy_update.ratio",
        f"is one ratio for all tokens of a response, which policy_update.mean={update.mean!r} "
        "would weigh by its length; set the mean to 'seq', or the ratio to 'token'",
    )
    need(
        update.ratio != "sequence" or max(update.clip_low, update.clip_high) <= 0.1,
        "policy_update.ratio",
        "is a mean over tokens, close to 1, which the range of single tokens "
        f"policy_update.clip_low={update.clip_low}, policy_update.clip_high={update.clip_high} "
        "would never clip; set both to at most 0.1 (the paper's are 3e-4 and 4e-4)",
    )
    need(
        update.ratio != "group" or (update.clip_low == 1 and update.clip_high == math.inf),
        "policy_update.ratio",
        "is not 1 where policies are equal, so that policy_update.clip_low="
        f"{update.clip_low}, policy_update.clip_high={update.clip_high} would clip at once; set "
        "them to 1 and inf",
    )
    need(update.kl_coef >= 0, "policy_update.kl_coef", "must be 0 or more")
    need(update.kl_target >= 0, "policy_update.kl_target", "must be 0 or more")
    need(update.kl_horizon > 0, "policy_update.kl_horizon", "must be over 0")
    need(
        not update.kl_target or uses_reference(config),
        "policy_update.kl_target",
        f"needs a KL, but policy_update.kl={update.kl!r} and policy_update.kl_coef="
        f"{update.kl_coef}; choose an estimate and a weight to start from, or a target of 0",
    )
    # The controller's factor must stay over 0.
    need(
        not update.kl_target or config.rollout.prompts * responses <= update.kl_horizon,
        "policy_update.kl_horizon",
        f"must be at least the {config.rollout.prompts * responses} responses of a step "
        "(rollout.prompts * rollout.responses)",
    )
    need(
        update.kl != "k1" or update.kl_place == "reward",
        "policy_update.kl",
        "has a gradient that knows nothing of the reference, so that policy_update.kl_place='loss' "
        "is of no use; set the place to 'reward', or the estimate to 'k2', 'k3' or 'abs'",
    )

    reward, limit = config.reward, config.rollout.max_tokens
    rule = f"must be 0 (none) to rollout.max_tokens={limit}"
    need(0 <= reward.overlong <= limit, "reward.overlong", rule)
    need(reward.overlong_weight >= 0, "reward.overlong_weight", "must be 0 or more")
    need(
        config.reflect.enabled or reward.reflection == "both",
        "reward.reflection",
        "chooses among reflections that reflect.enabled=False does not ask; enable them, or set "
        "this to 'both'",
    )
    plain = config.data.templates.set in PLAIN_STYLES
    need(
        not plain or not config.reflect.enabled,
        "data.templates.set",
        "asks for no steps to reflect on, but reflect.enabled=True; set it to false",
    )
    need(
        not plain or reward.format == "boxed" or not reward.lambda_format,
        "data.templates.set",
        "asks for no steps, which reward.format='set' looks for; set it to 'boxed', or "
        "reward.lambda_format to 0",
    )
    targets = ("label", "response")
    need(config.sft.target in targets, "sft.target", f"must be one of {targets}")
    need(config.sft.responses >= 1, "sft.responses", "must be at least 1")
    need(config.rollout.resample >= 0, "rollout.resample", "must be 0 or more")


def _check_reference(config: ConfigDict, need: Callable[[bool, str, str], None]) -> None:
    """Checks what is trained, by which rates, and from where the KL is measured."""
    policy, reference = config.policy, config.reference
    for name, rate in config.policy_update.rates.items():
        rule = "must be over 0; policy.freeze_vision_tower freezes the tower"
        need(rate > 0, f"policy_update.rates.{name}", rule)
    need(policy.lora_rank >= 0, "policy.lora_rank", "must be 0 (none) or more")
    need(policy.lora_alpha > 0, "policy.lora_alpha", "must be over 0")
    need(
        not policy.lora_rank or bool(policy.lora_modules),
        "policy.lora_rank",
        "needs modules to adapt, but policy.lora_modules=()",
    )
    tower = [name for name in policy.lora_modules if name.startswith(TOWER)]
    need(
        not (policy.lora_rank and policy.freeze_vision_tower and tower),
        "policy.lora_modules",
        f"names {tower[:1]} of the vision tower, but policy.freeze_vision_tower=True",
    )
    kinds = ("frozen", "refresh", "average", "none")
    need(reference.kind in kinds, "reference.kind", f"must be one of {kinds}")
    need(
        reference.kind != "none" or not uses_reference(config),
        "reference.kind",
        f"leaves nothing to measure policy_update.kl={config.policy_update.kl!r} from; set that to "
        "'off', or the kind to 'frozen'",
    )
    follows = reference.kind in ("refresh", "average")
    need(
        not follows or not policy.lora_rank,
        "reference.kind",
        f"would need weights of its own, but with policy.lora_rank={policy.lora_rank} the "
        "reference is the base without adapters; set the kind to 'frozen'",
    )
    need(reference.every >= 1, "reference.every", "must be at least 1")
    need(0 <= reference.decay < 1, "reference.decay", "must lie in [0, 1)")
    dtypes = ("", "float32", "bfloat16")
    need(reference.dtype in dtypes, "reference.dtype", f"must be one of {dtypes}")
    need(
        reference.kind != "average" or reference.dtype != "bfloat16",
        "reference.dtype",
        "would round away the small steps of reference.kind='average'; keep it in float32",
    )
    need(
        not policy.lora_rank or reference.dtype != "bfloat16",
        "reference.dtype",
        f"would be a second copy of the base that policy.lora_rank={policy.lora_rank} shares; set "
        "it to 'float32'",
    )
    need(reference.image_cache >= 0, "reference.image_cache", "must be 0 or more")
    need(
        not reference.image_cache or not follows or policy.freeze_vision_tower,
        "reference.image_cache",
        f"needs a tower that does not change, but reference.kind={reference.kind!r} follows a "
        "policy with policy.freeze_vision_tower=False; set it to 0, or freeze the tower",
    )


def uses_reference(config: ConfigDict) -> bool:
    """Returns whether a step scores the responses under the reference."""
    return config.policy_update.kl != "off" and config.policy_update.kl_coef > 0


def reward_terms(config: ConfigDict) -> tuple[Term, ...]:
    """Returns the reward terms of one's own.

    Raises:
      ConfigError: if one cannot be used.
    """
    found = []
    for name, each in config.reward.terms.items():
        try:
            found.append(make_term(name, each.weight, each.pattern, each.function, each.text))
        except (TermError, PatternError) as error:
            raise ConfigError(f"reward.terms.{name}", each.to_dict(), str(error)) from error
    return tuple(found)


def _need_buckets(config: ConfigDict, field: str) -> None:
    section, key = field.split(".")
    value = config[section][key]
    if not value or min(value) < 1 or list(value) != sorted(set(value)):
        raise ConfigError(field, value, "must be rising sizes, at least one, each over 0")
