"""From a config to the shapes of a training step, without weights, data or a device.

Assumptions, numbered, beside those of `emor3_jax.flops.step`:
 1. Steps 1 to 3 of a response are of equal length and fill it: coherence judges two thirds,
    consistency one.
 2. All prompt tokens that are not text are image tokens (drawn scenes have their own size).
 3. A judge that reads images by itself scales them to as many pixels as the policy, and a judged
    text has as many tokens for it.
"""

from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from emor3_jax.config import EMBEDDED, ConfigError
from emor3_jax.data.prompts import reflection_parts, render_prompt, shared_length
from emor3_jax.embedded.emoscenes.words import QUESTION
from emor3_jax.flops import JudgeShapes, QuestionTokens, ShapeError, StepShapes
from emor3_jax.models import LoadedPolicy, Policy, published, read_config, read_processor
from emor3_jax.models.family import Shapes
from emor3_jax.models.processor import Processor
from emor3_jax.prepare.data import load_templates, train_labels
from emor3_jax.prepare.embedded_policy import embedded_folder
from emor3_jax.prepare.judge import differences, judge_names, make_retokenizer
from emor3_jax.prepare.policy import sized
from emor3_jax.prepare.profile import listed_labels
from emor3_jax.rewards.questions import QUESTIONS


class TemplateTokens(NamedTuple):
    """Token counts of the templates, without images and judged texts.

    Attributes:
      before: of a prompt up to its image, and of the token that closes the image.
      after: of a prompt behind its image.
      questions: name → head and tail of the question.
      replies: name → length of its reply, the end of the turn included.
    """

    before: int
    after: int
    questions: dict[str, tuple[int, int]]
    replies: dict[str, int]


QWEN_TEMPLATE_TOKENS = TemplateTokens(
    before=16,
    after=154,
    questions=dict.fromkeys(QUESTIONS, (26, 46)) | {"consistency": (8, 24)},
    replies=dict.fromkeys(QUESTIONS, 3) | {"consistency": 2},
)
"""Qwen2.5-VL's tokenizer on the "qwen" templates, the labels of mikels8, and a short question.

Further questions are taken to be as long as that of coherence.
"""


def count_template_tokens(
    config: ConfigDict, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...]
) -> TemplateTokens:
    """Counts the tokens of the config's templates.

    Args:
      config: of the run.
      tokenizer: of the policy.
      labels: the label set.
    """
    templates = load_templates(config)
    prompt = render_prompt(tokenizer, templates.set, QUESTION, labels, 1)
    shared = shared_length(tokenizer, prompt)

    around, replies = {}, {}
    for name, question in QUESTIONS.items():
        template = templates.reflections[name]
        listed = listed_labels(config, labels)
        head, tail = reflection_parts(tokenizer, template, listed, question.with_image)
        around[name] = len(head), len(tail)
        meanings = question.meanings(labels)
        lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in meanings]
        replies[name] = round(sum(lengths) / len(lengths)) + 1
    return TemplateTokens(shared - 1, len(prompt) - shared, around, replies)


def read_policy_shapes(config: ConfigDict) -> tuple[Policy, TemplateTokens]:
    """Returns the config's policy without its parameters, and the token counts of its templates.

    Published policies are known by their id on the hub; nothing is downloaded.

    Args:
      config: of the run.

    Raises:
      ConfigError: if the policy is neither on this machine nor a published one.
    """
    policy, texts, _ = _read_shapes(config, "policy.path", config.policy.path)
    return policy, texts


class JudgeToLoad(NamedTuple):
    """A judge without its parameters.

    Attributes:
      policy: its shapes.
      texts: token counts of the templates, in its tokens.
      reads_alone: it shares nothing but the text with the policy.
      retokenizes: it lacks tokens of the policy.
    """

    policy: Policy
    texts: TemplateTokens
    reads_alone: bool = False
    retokenizes: bool = False


def read_judge_shapes(config: ConfigDict, field: str, name: str) -> JudgeToLoad:
    """Returns a judge that is neither the policy nor its reference, without its parameters.

    Where one of the two is not on this machine, only their families are compared.

    Args:
      config: of the run.
      field: of the config that names it.
      name: its folder or id on the hub.

    Raises:
      ConfigError: if it is neither on this machine nor a published one.
    """
    policy, _, ours = _read_shapes(config, "policy.path", config.policy.path)
    judge, texts, theirs = _read_shapes(config, field, name)
    if ours is None or theirs is None:
        alone = policy.family is not judge.family
        return JudgeToLoad(judge, texts, alone, alone)
    alone = bool(differences(LoadedPolicy(policy, {}, ours), LoadedPolicy(judge, {}, theirs)))
    retokenizes = alone and make_retokenizer(ours, theirs) is not None
    return JudgeToLoad(judge, texts, alone, retokenizes)


def _read_shapes(
    config: ConfigDict, field: str, path: str
) -> tuple[Policy, TemplateTokens, Processor | None]:
    """Returns a policy, its texts, and its processor if its folder is on this machine."""
    found = str(embedded_folder(config)) if path == EMBEDDED else path
    folder = Path(found)
    if (folder / "config.json").is_file():
        policy, labels = read_config(folder), train_labels(config)
        processor = sized(config, read_processor(folder, policy))
        return policy, count_template_tokens(config, processor.tokenizer, labels), processor
    if (policy := published(found)) is not None:
        return policy, QWEN_TEMPLATE_TOKENS, None
    rule = (
        "is not on this machine; name a published policy, "
        f"--config.{field}=Qwen/Qwen2.5-VL-3B-Instruct, or train the embedded one first"
    )
    raise ConfigError(field, path, rule)


def make_judge_shapes(config: ConfigDict, policy: Policy, step: StepShapes) -> StepShapes:
    """Returns the shapes of a step with those of its judge, in whose tokens the questions are then.

    Args:
      config: of the run.
      policy: the policy.
      step: its shapes, the questions in the policy's tokens.

    Raises:
      ConfigError: as `read_judge_shapes`.
    """
    name = judge_names(config)[0]
    if name == "policy" or not step.questions:
        return step
    read = None if name == "reference" else read_judge_shapes(config, "reflect.judge", name)
    judge = policy if read is None else read.policy
    parameters = sum(x.size for x in jax.tree.leaves(judge.param_shapes()))
    seen = step.prompt_tokens - 1, step.patches, step.shared_tokens
    questions = step.questions
    if read is not None and read.reads_alone:
        # As many pixels, in patches of its own size.
        unit, pixels = judge.shapes.merge_unit, step.patches * policy.shapes.vision.patch_size**2
        image = max(1, round(pixels / judge.shapes.vision.patch_size**2 / unit))
        tokens = read.texts.before + image
        seen = tokens, image * unit, tokens
        around, replies = read.texts.questions, read.texts.replies
        questions = {
            key: q._replace(head=around[key][0], tail=around[key][1], reply=replies[key])
            for key, q in questions.items()
        }
    return step._replace(
        judge=JudgeShapes(name, judge.shapes, *seen, parameters), questions=questions
    )


def make_step_shapes(
    config: ConfigDict,
    policy: Shapes,
    texts: TemplateTokens,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
) -> StepShapes:
    """Returns the shapes of a step of the config.

    Args:
      config: of the run.
      policy: its shapes.
      texts: token counts of its templates.
      prompt_tokens: P; None takes the longest prompt, or that of a drawn scene.
      response_tokens: T; None takes `rollout.max_tokens`.

    Raises:
      ShapeError: if the text of a prompt leaves no token for the image, or there is no response.
    """
    around = texts.before + texts.after
    if prompt_tokens is None and config.data.train.kind == "emoscenes":
        vision = policy.vision
        side = config.data.scene_size // (vision.patch_size * vision.spatial_merge_size)
        prompt_tokens = around + side**2
    elif prompt_tokens is None:
        prompt_tokens = max(config.data.prompt_lengths)
    image = prompt_tokens - around
    if image < 1:
        rule = f"the text of a prompt takes {around} tokens, and the image needs some; raise it"
        raise ShapeError("prompt_tokens", prompt_tokens, rule)
    t = config.rollout.max_tokens if response_tokens is None else response_tokens
    if t < 1:
        raise ShapeError("response_tokens", t, "must be at least 1")
    questions = {}
    for name, question in QUESTIONS.items() if config.reflect.enabled else ():
        head, tail = texts.questions[name]
        judged = (2 * t // 3, t // 3)[question.span]
        # Each meaning is scored in two spellings, see `rollout.reflect`.
        meanings = question.meanings(train_labels(config)) if config.reflect.soft else ()
        candidates, reply = max(1, 2 * len(meanings)), texts.replies[name]
        questions[name] = QuestionTokens(head, judged, tail, reply, candidates, question.with_image)
    return StepShapes(
        config.rollout.prompts,
        config.rollout.responses,
        prompt_tokens,
        t,
        image * policy.merge_unit,
        texts.before + image,
        questions,
    )
