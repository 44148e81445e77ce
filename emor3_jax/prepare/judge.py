"""From a config to who is asked about responses, in training and in evaluation.

Deviations, numbered:
 1. A judge with the tokens, chat template, image settings and family of the policy, such as another
    size of it, reads the prompts as they are. Any other reads the image by its own processor, and
    questions and text in its own tokens; where it has all tokens of the policy, as Qwen3-VL has
    those of Qwen2.5-VL, it reads the response's own.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax.config import ConfigError, uses_reference
from emor3_jax.data.encode import check_fit
from emor3_jax.data.errors import DataError
from emor3_jax.data.prefix import PrefixEncoder
from emor3_jax.data.prompts import opened_tag
from emor3_jax.learner.learner import Learner
from emor3_jax.models import LoadedPolicy
from emor3_jax.models.params import cast_matrices
from emor3_jax.models.policy import Policy
from emor3_jax.models.processor import Processor
from emor3_jax.parallel.mesh import MeshError
from emor3_jax.prepare.policy import load_policy
from emor3_jax.rewards.automaton import TokenizerError, token_bytes
from emor3_jax.rollout.judge import Judge
from emor3_jax.rollout.retokenize import Retokenizer, has_tokens
from emor3_jax.rollout.tokens import suppressed_tokens

logger = logging.getLogger(__name__)


class JudgeProcessors(NamedTuple):
    """Processors of judges that share nothing but the text; None reads as the policy does."""

    training: Processor | None = None
    evaluation: Processor | None = None


def judge_names(config: ConfigDict) -> tuple[str, str]:
    """Returns who is asked about responses in training and in evaluation."""
    asked = config.reflect.judge if config.reflect.enabled else "policy"
    if not (config.reflect.enabled or config.evaluate.reflect):
        return asked, "policy"
    return asked, config.evaluate.judge or config.reflect.judge


def keeps_reference(config: ConfigDict) -> bool:
    """Returns whether a reference is kept: for a KL, or as a judge."""
    return uses_reference(config) or "reference" in judge_names(config)


class Judges:
    """Who is asked about responses; holds the parameters of judges that are read from a folder.

    Attributes:
      training, evaluation: their names, as the config has them; training is "" where no question
        is asked there.
      processors: of judges that share nothing but the text.
    """

    def __init__(
        self,
        config: ConfigDict,
        policy: LoadedPolicy,
        say: Callable[[str], None],
        mesh: Mesh,
        *,
        imitate: bool = False,
    ) -> None:
        """Loads the judges that are neither the policy nor its reference.

        Args:
          config: of the run.
          policy: whose responses they judge.
          say: announces stages.
          mesh: cuts their parameters.
          imitate: supervised fine-tuning, which asks in evaluation alone.

        Raises:
          ConfigError: as `load_judge`.
          FileNotFoundError: if there is no such folder or policy on the hub.
        """
        self.training, self.evaluation = judge_names(config)
        if imitate or not config.reflect.enabled:
            self.training = ""
        self._policy = policy.policy
        self._suppressed = suppressed_tokens(policy.shapes.vocab_size, policy.processor.tokenizer)
        named = "evaluate.judge" if config.evaluate.judge else "reflect.judge"
        fields = {self.evaluation: named, self.training: "reflect.judge"}
        self._loaded: dict[str, Judge] = {}
        for name in fields.keys() - {"", "policy", "reference"}:
            say(f"loading the judge {name}")
            self._loaded[name] = load_judge(config, fields[name], name, policy, say, mesh)
        self.processors = JudgeProcessors(
            *(
                self._loaded[name].processor if name in self._loaded else None
                for name in (self.training, self.evaluation)
            )
        )

    def of_training(self, learner: Learner) -> Judge | None:
        """Returns who is asked in training; None for the policy itself."""
        return self._find(self.training, learner)

    def of_evaluation(self, learner: Learner) -> Judge | None:
        """Returns who is asked in evaluation; None for the policy itself."""
        return self._find(self.evaluation, learner)

    def policy_of_training(self) -> Policy | None:
        """Returns shapes and arithmetic of who is asked in training; None for the policy itself."""
        if self.training in ("", "policy"):
            return None
        judge = self._loaded.get(self.training)
        return judge.policy if judge else self._policy

    def _find(self, name: str, learner: Learner) -> Judge | None:
        if name in ("", "policy"):
            return None
        if name == "reference":
            return Judge(self._policy, learner.reference.params, self._suppressed)
        return self._loaded[name]


def load_judge(
    config: ConfigDict,
    field: str,
    path: str,
    policy: LoadedPolicy,
    say: Callable[[str], None],
    mesh: Mesh,
) -> Judge:
    """Loads a judge in the compute type, cut over the mesh as the reference is.

    Args:
      config: of the run.
      field: of the config that names it.
      path: its folder or id on the hub.
      policy: whose responses it judges.
      say: announces stages.
      mesh: of the devices.

    Raises:
      ConfigError: if its tokenizer or chat template is none that can be used, or its images do not
        fit `reflect.judge_windows`.
      MeshError: naming the field too, if the mesh cannot cut it.
    """
    own = ConfigDict(config.to_dict())
    own.policy.path = path
    try:
        judge = load_policy(own, say, mesh)
    except MeshError as error:
        raise MeshError(f"config.{field}={path!r}: {error}") from error
    params = cast_matrices(judge.params, jnp.dtype(config.policy.dtype))
    suppressed = suppressed_tokens(judge.shapes.vocab_size, judge.processor.tokenizer)
    found = differences(policy, judge)
    if not found:
        return Judge(judge.policy, params, suppressed)
    say(f"the judge {path} has its own {', '.join(found)}: it reads image and text by itself")
    _check_processor(config, field, path, judge.processor)
    if tag := opened_tag(judge.processor.tokenizer):
        logger.warning(
            "the chat template of %s=%s opens %s for each reply: one that begins there is neither "
            "a label nor yes or no; take a template without it (chat_template.jinja in its folder)",
            field,
            path,
            tag,
        )
    return Judge(judge.policy, params, suppressed, judge.processor)


def differences(policy: LoadedPolicy, judge: LoadedPolicy) -> list[str]:
    """Returns in what a judge differs from the policy so that it cannot read its prompts."""
    ours, theirs = policy.processor, judge.processor
    alike = {
        "family": policy.policy.family is judge.policy.family,
        "tokens": ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab(),
        "chat template": ours.tokenizer.chat_template == theirs.tokenizer.chat_template,
        "image settings": ours.images == theirs.images
        and policy.policy.layout == judge.policy.layout,
    }
    return [name for name, same in alike.items() if not same]


def prefix_windows(config: ConfigDict) -> tuple[int, ...]:
    """Returns the choices of windows of an image that a judge reads by itself, rising."""
    return tuple(config.reflect.judge_windows or config.data.image_windows)


def make_prefix_encoder(config: ConfigDict, processor: Processor | None) -> PrefixEncoder | None:
    """Returns the encoder of a judge's images; None where it reads the policy's prompts."""
    return processor and PrefixEncoder(processor, prefix_windows(config))


def make_retokenizer(policy: Processor, judge: Processor | None) -> Retokenizer | None:
    """Returns the retokenizer of judged texts; None where the judge has the policy's tokens."""
    if judge is None or has_tokens(judge.tokenizer, policy.tokenizer):
        return None
    return Retokenizer(policy.tokenizer, judge.tokenizer)


def _check_processor(config: ConfigDict, field: str, path: str, processor: Processor) -> None:
    """Raises ConfigError if a judge cannot be asked by its own tokenizer and image settings."""
    try:
        check_fit(processor)
        prefixes = make_prefix_encoder(config, processor)
        token_bytes(processor.tokenizer)
    except (DataError, TokenizerError) as error:
        rule = f"cannot be asked about images and texts: {error}; name another judge"
        raise ConfigError(field, path, rule) from error
    # The smallest image that it ever reads is a square of so many pixels.
    side = round(processor.images.min_pixels**0.5)
    _, _, windows = processor.read_sizes(side, side)
    if windows > prefixes.windows[-1]:
        rule = (
            f"{field}={path!r} scales images to {processor.images.min_pixels} pixels or more, "
            f"which take {windows} windows; give that or more, or set data.min_pixels"
        )
        raise ConfigError("reflect.judge_windows", prefixes.windows, rule)
