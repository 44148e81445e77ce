"""From a config to who is asked about responses, in training and in evaluation.

Deviations, numbered:
 1. A judge of its own has the tokens and image settings of the policy, so that it reads the prompts
    as they are; another size of the same family does, another family does not.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from emor3_jax.config import ConfigError, uses_reference
from emor3_jax.learner.learner import Learner
from emor3_jax.models import LoadedPolicy
from emor3_jax.models.params import cast_matrices
from emor3_jax.prepare.policy import load_policy
from emor3_jax.rollout.judge import Judge
from emor3_jax.rollout.tokens import suppressed_tokens


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
    """Who is asked about responses; holds the parameters of judges that are read from a folder."""

    def __init__(
        self, config: ConfigDict, policy: LoadedPolicy, say: Callable[[str], None], mesh: Mesh
    ) -> None:
        """Loads the judges that are neither the policy nor its reference.

        Args:
          config: of the run.
          policy: whose responses they judge.
          say: announces stages.
          mesh: cuts their parameters.

        Raises:
          ConfigError: if a judge reads other tokens or images than the policy.
          FileNotFoundError: if there is no such folder or policy on the hub.
        """
        self.training, self.evaluation = judge_names(config)
        self._policy = policy.policy
        self._suppressed = suppressed_tokens(policy.shapes.vocab_size, policy.processor.tokenizer)
        fields = {self.evaluation: "evaluate.judge", self.training: "reflect.judge"}
        self._loaded: dict[str, Judge] = {}
        for name in fields.keys() - {"policy", "reference"}:
            say(f"loading the judge {name}")
            self._loaded[name] = load_judge(config, fields[name], name, policy, say, mesh)

    def of_training(self, learner: Learner) -> Judge | None:
        """Returns who is asked in training; None for the policy itself."""
        return self._find(self.training, learner)

    def of_evaluation(self, learner: Learner) -> Judge | None:
        """Returns who is asked in evaluation; None for the policy itself."""
        return self._find(self.evaluation, learner)

    def _find(self, name: str, learner: Learner) -> Judge | None:
        if name == "policy":
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
      ConfigError: if it reads other tokens or images than the policy.
    """
    own = ConfigDict(config.to_dict())
    own.policy.path = path
    judge = load_policy(own, say, mesh)
    ours, theirs = policy.processor, judge.processor
    alike = {
        "tokens": ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab(),
        "family": policy.policy.family is judge.policy.family,
        "image settings": ours.images == theirs.images
        and policy.policy.layout == judge.policy.layout,
    }
    if other := [name for name, same in alike.items() if not same]:
        rule = (
            f"reads the prompts of policy.path={config.policy.path!r}, but has other "
            f"{' and '.join(other)}; name a policy of the same family, or 'reference'"
        )
        raise ConfigError(field, path, rule)
    params = cast_matrices(judge.params, jnp.dtype(config.policy.dtype))
    suppressed = suppressed_tokens(judge.shapes.vocab_size, theirs.tokenizer)
    return Judge(judge.policy, params, suppressed)
