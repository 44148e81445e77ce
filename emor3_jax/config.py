"""The config of every program: all fields with their defaults. What may be chosen: `checks`.

A file in `configs/` starts from `default()` and sets what differs. `--config.key=value` overrides
on the command line; an unknown key is an error that names the nearest one (`ml_collections`).
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from emor3_jax.errors import UserError
from emor3_jax.rewards.patterns import PatternError
from emor3_jax.rewards.questions import QUESTIONS
from emor3_jax.rewards.terms import Term, TermError, make_term

EMBEDDED = "embedded"
"""`policy.path` of the trained base policy that comes with the package."""


class ConfigError(UserError):
    """A field of the config is wrong: names the field, its value, the rule and the way out."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(f"config.{field}={value!r}: {rule}")


def dataset(**fields: object) -> ConfigDict:
    """Returns the description of one data set; `fields` override the defaults."""
    config = ConfigDict()
    # "emoscenes", drawn by the package; "parquet", files in the release's schema; a named data set
    # in the folder that its authors publish (`data/datasets/catalog.py` lists them); or "folders",
    # "jsonl", "huggingface" (docs/data.md).
    config.kind = "emoscenes"
    # Folder or file; for parquet a path, a glob, or several joined by commas.
    config.path = ""
    # Which rows: train, validation, test, whole; emoscenes also has pretrain, shifted_pretrain and
    # shifted_test. "" is train, and all rows of parquet and jsonl, where a split is a column.
    config.split = ""
    # A label set by name (mikels8, emotion6, emotion7, fer7, webemo25, webemo7, polarity2, …,
    # data/labels.py), or labels joined by commas. "" takes the data set's own; of parquet and
    # jsonl, mikels8.
    config.labels = ""
    # Named data sets with several label rules or tasks: which one (docs/data.md); "" is the first.
    config.label = ""
    # Where parquet, jsonl and huggingface have other names: role:column, joined by commas, such as
    # "image:photo,answer:emotion"; roles are image, question, answer, distribution, response, id
    # and split.
    config.columns = ""
    # Parquet, jsonl and huggingface: images may lie anywhere; else paths that are absolute or leave
    # the folder of the data by ".." are refused.
    config.outside_files = False
    # Asked of every image instead of the data set's own question; "" asks that.
    config.question = ""
    # Named data sets: copy the images into the records that are built (data/datasets/base.py).
    config.copy = False
    # Only so many rows; 0 takes all. Their ids are kept in workdir/subsets. As many of each label
    # ("class"), or in the mix of the data ("natural"); drawn by this seed, or by the run's (-1).
    config.subset = 0
    config.subset_mix = "class"
    config.subset_seed = -1
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
    # Factor of the term in the reward; negative for a penalty.
    config.weight = 0.1
    # A regular expression: 1 where it matches the response, else 0.
    config.pattern = ""
    # "module:name" of a jitted function: `rewards.Group` → float32[B, G].
    config.function = ""
    # "module:name" of a function in plain Python: (response, label) → a number. Slow.
    config.text = ""
    return _updated(config, fields)


def _updated(config: ConfigDict, fields: dict[str, object]) -> ConfigDict:
    """Returns a description with fields of it changed; raises UserError for an unknown one."""
    for name, value in fields.items():
        if name not in config:
            raise UserError(f"{name}={value!r}: {no_field(name, config.keys())}")
    config.update(fields)
    return config


def no_field(name: str, known: Iterable[str]) -> str:
    """Returns that there is no such field, and the nearest one."""
    (nearest,) = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
    return f"there is no such field; the nearest one is {nearest}"


def default() -> ConfigDict:
    """Returns the defaults: the paper's method at the release's settings."""
    config = ConfigDict()
    # Seed of the data's order, of sampling and of subsets.
    config.seed = 0
    # Optimisation steps; each rolls out `rollout.prompts` prompts.
    config.steps = 100
    # "paper" or "release": the two versions of the method (docs/method.md).
    config.profile = "paper"

    config.policy = ConfigDict()
    # A Hugging Face folder; an id on the hub, "owner/name" or "owner/name@revision"; or "embedded".
    config.policy.path = EMBEDDED
    # Where the embedded base policy is kept, and trained first if it is not there; "" is the one of
    # the package for Qwen2.5-VL and scenes of 112 pixels, else a folder in runs.
    config.policy.embedded_folder = ""
    # Architecture of the embedded base policy: "qwen2_5_vl" or "qwen3_vl".
    config.policy.embedded_family = "qwen2_5_vl"
    # Type of the layers' arithmetic; master weights, norms and softmax are float32. What bfloat16
    # changes in log-probabilities: docs/results/precision.md.
    config.policy.dtype = "bfloat16"
    # "xla", "splash" (TPU), "cudnn" (NVIDIA GPU), or "auto": the one of the platform.
    config.policy.attention = "auto"
    # Of decoded tokens: "xla" reads the whole cache, "ragged" (TPU) only what is in use, or "auto".
    config.policy.decode_attention = "auto"
    # Then the tower has no backward pass, no moments and no part in the gradient's norm.
    config.policy.freeze_vision_tower = False
    # Train adapters of this rank alone (models/lora.py), scaled by alpha over rank, in these
    # modules: those of the decoder by name, those of the vision tower as "visual/qkv". Rank 0
    # trains the weights themselves.
    config.policy.lora_rank = 0
    config.policy.lora_alpha = 32.0
    config.policy.lora_modules = ("q_proj", "k_proj", "v_proj", "o_proj")

    config.data = ConfigDict()
    # The training set.
    config.data.train = dataset()
    # Name → data set: further training sets, mixed with `data.train` by their weights and put into
    # its labels.
    config.data.mix = ConfigDict()
    # Where emoscenes and the named data sets are built.
    config.data.folder = "runs/data"
    # Side of the drawn scenes in pixels, 112 to 224.
    config.data.scene_size = 112
    # Padded prompt lengths and numbers of attention windows; a batch takes the smallest that fits,
    # and each micro-batch of scoring and update likewise.
    config.data.prompt_lengths = (512, 1024, 2048)
    config.data.image_windows = (64, 128, 256, 350)
    # Images of more pixels are left out, since decoding takes up to 8 bytes for each.
    config.data.max_decoded_pixels = 2**26
    # Images are scaled to have between so many pixels; 0 keeps what the policy's folder says. The
    # release's profile does it in a resize of its own, before that of the folder.
    config.data.min_pixels = 0
    config.data.max_pixels = 0
    # Processes that decode images; 0 does it in the training process.
    config.data.workers = 0
    # Rows that are decoded while a step is computed, up to a batch of them; an image takes up to
    # 25 MB in bfloat16 until it is used.
    config.data.read_ahead = 64
    # Training batches of images of like size, which need less padding.
    config.data.sort_by_size = False
    # Of a prompt over the largest length: "drop" the row, or "cut" the end of its question.
    config.data.long_prompts = "drop"
    # Template files, or a built-in set by name: "qwen" or "tiny"; for `set` also "think", "direct"
    # and "tiny_direct", which have no steps (docs/data.md), and "confidence" and "valence_arousal",
    # which ask for numbers too (docs/evaluation.md). Questions about a response also "release", the
    # same in the release's order; "" is the profile's: "qwen" in the paper's, else "release".
    config.data.templates = ConfigDict()
    config.data.templates.set = "qwen"
    for name in QUESTIONS:
        config.data.templates[name] = ""

    config.rollout = ConfigDict()
    # B, prompts a step, and G, responses to each.
    config.rollout.prompts = 512
    config.rollout.responses = 8
    # T, the longest response; one that reaches it is cut off.
    config.rollout.max_tokens = 2048
    # Prompts in flight at once; 0 is all of them. As groups end, `refill` prompts leave and others
    # enter; both must divide (docs/engine.md).
    config.rollout.slots = 0
    config.rollout.refill = 0
    # Responses of these prompts that are decoded at once; 0 is all of them. As one ends, another
    # begins.
    config.rollout.lanes = 0
    # Tokens that are decoded between two reads of the host, and the smallest cache.
    config.rollout.block = 128
    # How often the number of responses that are decoded at once may be halved when none waits;
    # there is a step between two halves.
    config.rollout.halvings = 4
    # Decode without a loop over the layers: faster on CPU in bfloat16 (docs/engine.md).
    config.rollout.unroll = False
    # How the matrices of the decoder's layers are kept while responses are sampled: "" for
    # policy.dtype, or "int8" (models/quantisation.py), best with "recompute" and a correction of
    # `policy_update`. Evaluation decodes in policy.dtype.
    config.rollout.weight_dtype = ""
    # DAPO's dynamic sampling: further batches a step may draw to replace prompts whose responses
    # have nothing to compare; then it goes on with what it has. 0 keeps every prompt.
    config.rollout.resample = 0
    # Of sampling in training.
    config.rollout.temperature = 1.0
    config.rollout.top_p = 1.0

    config.reflect = ConfigDict()
    # False is plain GRPO: no reflection is asked, and its weight goes as the profile says.
    config.reflect.enabled = True
    # Who is asked: "policy", itself; "reference", from which the KL is measured;
    # "embedded", the base policy; or the folder or hub id of another, of any family and any tokens.
    config.reflect.judge = "policy"
    # Numbers of windows of the images of a judge of another family, tokens or image settings, as
    # `data.image_windows`, which () takes; images with more are left out.
    config.reflect.judge_windows = ()
    # Beyond the method: score replies by their likelihood, in one pass, instead of sampling one.
    config.reflect.soft = False
    # Of sampled replies.
    config.reflect.temperature = 0.6
    config.reflect.top_p = 0.95
    # Replies are cut at so many tokens; a label and the end of sequence must fit. 0 is the
    # profile's: 8 in the paper's, `rollout.max_tokens` in the release's, whose cache is as long.
    config.reflect.max_tokens = 0
    # Padded lengths of the judged text; a batch takes the smallest that fits its longest text.
    config.reflect.text_lengths = (128, 512, 2048)

    config.reward = ConfigDict()
    # "label", or "answer": coherence against the response's own boxed answer (paper, Figure 2).
    config.reward.coherence_target = "label"
    # Weights of the reflection and of the format in the reward (docs/method.md).
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
    # Name → `reward_term(…)`: custom reward terms, added with their weights.
    config.reward.terms = ConfigDict()
    # Folder of reward tables, shared by runs; "" keeps none.
    config.reward.table_cache = "runs/reward_tables"

    config.policy_update = ConfigDict()
    # Prompts of an update; a step takes `rollout.prompts` over this of them.
    config.policy_update.prompts = 256
    # Prompts whose activations are in memory at once.
    config.policy_update.micro_prompts = 8
    # Of AdamW.
    config.policy_update.learning_rate = 2e-6
    # Updates over which the learning rate rises to its value.
    config.policy_update.warmup_steps = 0
    # "constant", or "linear": falls to 0 at the last of `steps`.
    config.policy_update.schedule = "constant"
    # Factors of the learning rate for groups of parameters; 1 for those that are not trained.
    config.policy_update.rates = ConfigDict()
    config.policy_update.rates.tower = 1.0
    config.policy_update.rates.merger = 1.0
    config.policy_update.rates.embedding = 1.0
    config.policy_update.rates.decoder = 1.0
    # AdamW's weight decay, and the norm that a larger gradient is scaled down to.
    config.policy_update.weight_decay = 1e-2
    config.policy_update.max_grad_norm = 1.0
    # In which AdamW's first moment is kept: "bfloat16" takes 2 bytes a parameter less.
    config.policy_update.mu_dtype = "float32"
    # "grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gdpo", "maxrl", "opo" or
    # "remax", which answers each prompt once more, greedily (rl/advantages/).
    config.policy_update.advantage = "grpo"
    # "clip", "gspo", "gepo", "cispo", "sapo", "gmpo", "dppo_tv", "dppo_kl" or "ipo"
    # (rl/surrogates/).
    config.policy_update.surrogate = "clip"
    # Bounds of most surrogates, each in its own way. Of "clip", a `clip_low` of 1 and infinite
    # others clip nothing.
    config.policy_update.clip_low = 0.2
    config.policy_update.clip_high = 0.3
    config.policy_update.clip_dual = 3.0
    # Temperatures of "sapo" for good and for bad responses.
    config.policy_update.sapo_positive = 1.0
    config.policy_update.sapo_negative = 1.05
    # "token": mean over all response tokens; "seq": within each response first; "constant": each
    # token weighs 1 / `rollout.max_tokens` of its response.
    config.policy_update.mean = "token"
    # Leave responses that were cut off at `rollout.max_tokens` out of the loss (DAPO).
    config.policy_update.mask_truncated = False
    # Leave groups whose rewards are all equal out of it, of the KL too.
    config.policy_update.mask_equal = False
    # Leave out bad responses whose tokens have become less likely by more than this, in nats, on
    # average since they were sampled (DeepSeek-V3.2).
    config.policy_update.off_policy = math.inf
    # Estimate of the KL to the reference: "k1", "k2", "k3", "abs" or "off" (rl/kl.py), and whether
    # it is a term of the "loss" or is taken off the "reward".
    config.policy_update.kl = "k3"
    config.policy_update.kl_place = "loss"
    # Its weight; where `kl_target`, in nats a token, is over 0, the weight at the start. It then
    # changes by up to a fifth in `kl_horizon` responses to come to that target.
    config.policy_update.kl_coef = 1e-2
    config.policy_update.kl_target = 0.0
    config.policy_update.kl_horizon = 10_000.0
    # Multiply each token's KL by its ratio, which makes it unbiased (DeepSeek-V3.2).
    config.policy_update.kl_ratio = False
    # "sampler": the behaviour policy's log-probabilities are those that sampling recorded;
    # "recompute": they are computed again before the first update, `policy/sampler_gap` apart.
    config.policy_update.old_logprobs = "sampler"
    # With "recompute", weigh each surrogate by the ratio of the two: "off", "token_truncate",
    # "token_mask", "sequence_truncate", "sequence_mask" or "geometric_mask" (rl/correction.py),
    # with bounds of the weight.
    config.policy_update.correction = "off"
    config.policy_update.correction_low = 0.0
    config.policy_update.correction_high = 2.0
    # "all" tokens, or "top_entropy", "clip_cov" or "kl_cov" (rl/selection.py), of which a share is
    # selected; bounds of the covariance, and the weight of "kl_cov".
    config.policy_update.select = "all"
    config.policy_update.select_share = 0.2
    config.policy_update.select_low = 1.0
    config.policy_update.select_high = 5.0
    config.policy_update.select_coef = 1.0
    # Weight of an entropy bonus; where `entropy_target`, in nats a token, is over 0, the weight at
    # the start. It then rises by `entropy_delta` a step up to `entropy_most` while the entropy is
    # below the target, falls else, and counts only below it.
    config.policy_update.entropy_coef = 0.0
    config.policy_update.entropy_target = 0.0
    config.policy_update.entropy_delta = 0.005
    config.policy_update.entropy_most = 1.0
    # What the backward pass recomputes: "none", "activations" or "layers", from fast to small.
    config.policy_update.remat = "layers"
    # Short responses of a group share a row; where attention is "splash", those of several groups.
    config.policy_update.pack = True
    # Choose the prompts of a step's updates so that each has like many tokens on each part of the
    # mesh; else update u of U has the prompts u, U + u, …
    config.policy_update.balance = False
    # Report `policy/entropy`, for one more pass over the logits.
    config.policy_update.entropy = False
    # Tokens of a device whose logits exist at once: 0.6 GB for 1,024 of a 3B.
    config.policy_update.logprob_chunk = 1024
    # Padded response lengths of scoring and update; each micro-batch takes the smallest that fits.
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
    # Bytes on the host for the features of its images, kept over epochs; 0 keeps none.
    config.reference.image_cache = 0

    # Supervised fine-tuning (`emor3_jax.sft`); everything else of it is in the other sections.
    config.sft = ConfigDict()
    # "label": the boxed label alone; "response": what each row says itself, at most so many of it.
    config.sft.target = "label"
    config.sft.responses = 4

    config.evaluate = ConfigDict()
    # Name → data set; the first one by the alphabet is watched during training. On the command line
    # a new one is made by its kind: --config.evaluate.sets.mine.kind=jsonl.
    config.evaluate.sets = ConfigDict()
    # Rows of each set that are evaluated before training: -1 is all, 0 is none.
    config.evaluate.before = -1
    # Steps between evaluations of the first set, on `evaluate.during` of its rows.
    config.evaluate.every = 50
    config.evaluate.during = 200
    # Rows of a batch; `slots`, `refill` and `lanes` are those of the rollout for its responses.
    config.evaluate.prompts = 64
    config.evaluate.slots = 0
    config.evaluate.refill = 0
    config.evaluate.lanes = 0
    # 0 is greedy; -1 is the profile's: 0 in the paper's, 0.6 in the release's.
    config.evaluate.temperature = -1.0
    # 0 is 1; where the profile sets the temperature, it is 0.95 in the release's.
    config.evaluate.top_p = 0.0
    # Responses to each row; the label that most of them box is its answer.
    config.evaluate.votes = 1
    # The program evaluates the policy of a run's checkpoint instead of `policy.path`, which it must
    # have started from: "runs/demo" (the newest) or "runs/demo/checkpoints/40".
    config.evaluate.checkpoint = ""
    # Ask both reflections here even where `reflect.enabled` is false, for the metrics of reasoning.
    config.evaluate.reflect = False
    # Who is asked here; "" is who is asked in training. With "reference", what is measured before
    # and after training is judged alike.
    config.evaluate.judge = ""
    # Also weigh all labels behind each response's own reasoning: a confidence of its answer
    # (docs/evaluation.md), for one more pass over prompts and responses. Not every
    # `evaluate.every` steps.
    config.evaluate.likelihood = False
    # Name → names of sets whose means are reported together, such as in_domain=("emoset", "fi").
    config.evaluate.groups = ConfigDict()

    config.mesh = ConfigDict()
    # Sizes of the mesh axes; -1 is "the rest".
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 1

    config.checkpoint = ConfigDict()
    # Steps between checkpoints, and the minutes after which there is one in any case; 0 leaves the
    # minutes out. They are written while the run goes on.
    config.checkpoint.every = 50
    config.checkpoint.minutes = 0.0
    config.checkpoint.keep = 2
    # A run that is asked to stop ends where nothing is half done. What takes more seconds, such as
    # compiling, is not waited for. A spot machine is gone 30 seconds after the notice.
    config.checkpoint.stop_seconds = 15.0
    # Go on in a folder whose run had other settings; without it they are shown and refused.
    config.checkpoint.resume_changed = False

    # Guards of a run (runtime/guards.py): updates all skipped, rewards all equal, responses all
    # truncated, a KL that runs away, rewards or losses that are no numbers. The batch of the step
    # that ends a run is kept, and python -m emor3_jax.replay WORKDIR looks into it.
    config.guard = ConfigDict()
    # Steps in a row after which a guard warns, and ends the run; 0 for never.
    config.guard.warn_after = 3
    config.guard.stop_after = 50
    # Largest KL, in nats a token; 0 is no limit.
    config.guard.max_kl = 10.0

    config.log = ConfigDict()
    # Where metrics are written (io/sinks): "jsonl", always, since a run resumes by it,
    # "tensorboard", and where they are installed "wandb" and "mlflow".
    config.log.sinks = ("jsonl", "tensorboard")
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
    # Seed of the weights, and of the order of the examples.
    config.seed = 0
    config.data = ConfigDict()
    # "emoscenes", which is drawn into `data.folder`; or "faces": the parquet files of `data.path`,
    # as `configs/fer2013.py` reads.
    config.data.kind = "emoscenes"
    config.data.folder = "runs/data"
    config.data.path = ""
    # Images to learn from, drawn by the seed.
    config.data.limit = 8000
    # Side of an image in pixels, best a multiple of a token's, which is twice `model.patch`.
    config.data.size = 112
    # Strength of the random turn, shift, scale and light of images; 0 leaves them unchanged.
    config.data.warp = 0.0

    config.model = ConfigDict()
    # Architecture, "qwen2_5_vl" or "qwen3_vl", and the size of its vocabulary.
    config.model.family = "qwen2_5_vl"
    config.model.vocab_size = 1200
    # Sides in pixels of a patch, and of a window that most layers of Qwen2.5-VL attend in: whole
    # tokens.
    config.model.patch = 14
    config.model.window = 112
    # Width, layers and heads of the vision tower, and of the decoder.
    config.model.vision_width = 128
    config.model.vision_layers = 3
    config.model.vision_heads = 4
    config.model.width = 192
    config.model.layers = 3
    config.model.heads = 6
    config.model.kv_heads = 2

    # Vision pretraining, before the QA examples: predict the emotion from the image alone.
    config.look = ConfigDict()
    # Its length, 0 for none; its batch, and its optimizer.
    config.look.steps = 0
    config.look.batch = 256
    config.look.learning_rate = 5e-3
    config.look.warmup_steps = 80
    config.look.weight_decay = 0.03
    # Images are mixed in pairs by shares of Beta(mix, mix); 0 disables mixup.
    config.look.mix = 0.0
    # Probability that an image has a random rectangle erased.
    config.look.erase = 0.0

    # Training on QA examples: its length, its batch, and its optimizer.
    config.steps = 380
    config.batch = 32
    config.learning_rate = 2e-3
    config.warmup_steps = 30
    config.weight_decay = 0.02
    # Type of the saved parameters; training is in float32.
    config.dtype = "float32"
    config.rates = ConfigDict()
    # Factor on the learning rate of the vision tower while training on QA examples.
    config.rates.tower = 1.0
    # Folder of compiled programs; "" keeps none.
    config.compile_cache = "runs/compile_cache"
    return config


_NAMED = ("data.mix", "evaluate.sets", "evaluate.groups", "reward.terms")
"""Sections whose entries have names of one's own."""


def check_complete(config: ConfigDict, made: Callable[[], ConfigDict]) -> None:
    """Checks that a config has all fields that its program reads, and no others.

    Args:
      config: of a program.
      made: the function of this module that makes a whole one.

    Raises:
      UserError: naming the first field that is missing, or that nothing reads.
    """
    whole = made()
    have, known = ({field for field, _ in _fields(each)} for each in (config, whole))
    missing = next((field for field, _ in _fields(whole) if field not in have), None)
    if missing is not None:
        raise UserError(
            f"--config: has no field {missing}, so it is not for this program; a config for it "
            f"starts from emor3_jax.config.{made.__name__}()"
        )
    for field, value in _fields(config):
        if field not in known and not any(field.startswith(f"{each}.") for each in _NAMED):
            raise ConfigError(field, value, no_field(field, known))


def uses_reference(config: ConfigDict) -> bool:
    """Returns whether a step scores the responses under the reference."""
    return config.policy_update.kl != "off" and config.policy_update.kl_coef > 0


def field_value(config: ConfigDict, field: str) -> Any:
    """Returns the value of a field, named with its sections, as in "rollout.slots"."""
    for key in field.split("."):
        config = config[key]
    return config


def check_numbers(
    config: ConfigDict,
    at_least: Mapping[str, float],
    over_0: Iterable[str],
    unbounded: Iterable[str] = (),
) -> None:
    """Checks every number of a config by itself.

    Args:
      config: of a program.
      at_least: field → the least that it may be.
      over_0: fields that must be more than 0.
      unbounded: fields that may be infinite, as no others may.

    Raises:
      ConfigError: for a number that is too small, infinite or not a number.
    """
    for field, value in _fields(config):
        infinite = value == math.inf and field in unbounded
        if isinstance(value, float) and not math.isfinite(value) and not infinite:
            raise ConfigError(field, value, "must be a finite number")
    for field in over_0:
        if field_value(config, field) <= 0:
            raise ConfigError(field, field_value(config, field), "must be over 0")
    for field, least in at_least.items():
        if field_value(config, field) < least:
            rule = f"must be at least {least}" if least else "must be 0 or more"
            raise ConfigError(field, field_value(config, field), rule)


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields the name of each field, with its sections in front, and its value."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def reward_terms(config: ConfigDict) -> tuple[Term, ...]:
    """Returns the custom reward terms.

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
