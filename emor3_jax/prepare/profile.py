"""What `config.profile` decides where the config leaves it open (docs/method.md)."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from emor3_jax.data.prompts import has_release_order

PAPER_REPLY_TOKENS = 8
EVALUATION_SAMPLING = {"paper": (0.0, 1.0), "release": (0.6, 0.95)}
"""Profile → temperature and top-p of an evaluation; the release's are those of its validation."""


def reply_tokens(config: ConfigDict) -> int:
    """Returns the longest reply to a reflection; in the release it may be as long as a response."""
    if config.reflect.max_tokens:
        return config.reflect.max_tokens
    return config.rollout.max_tokens if config.profile == "release" else PAPER_REPLY_TOKENS


def evaluation_sampling(config: ConfigDict) -> tuple[float, float]:
    """Returns temperature and top-p of an evaluation.

    A temperature that the config states comes with a top-p of 1, unless it states that too.
    """
    stated, top_p = config.evaluate.temperature, config.evaluate.top_p
    temperature, default = (stated, 1.0) if stated >= 0 else EVALUATION_SAMPLING[config.profile]
    return temperature, top_p or default


def template_names(config: ConfigDict) -> dict[str, str]:
    """Returns kind → file or name of each template, as `PromptTemplates.load` takes them."""
    chosen = config.data.templates.to_dict()
    for kind, name in chosen.items():
        if not name:
            release = config.profile == "release" and has_release_order(kind)
            chosen[kind] = "release" if release else "qwen"
    return chosen


def listed_labels(config: ConfigDict, labels: Sequence[str]) -> tuple[str, ...]:
    """Returns the labels as a reflection lists them: in alphabetical order in the release.

    Only the text of the question depends on it, not the numbers of labels.
    """
    return tuple(sorted(labels) if config.profile == "release" else labels)


def stated(config: ConfigDict) -> ConfigDict:
    """Returns a copy that states the length of replies and the templates of its profile."""
    filled = config.copy_and_resolve_references()
    filled.reflect.max_tokens = reply_tokens(config)
    filled.data.templates.update(template_names(config))
    return filled


def drops_last_batch(config: ConfigDict) -> bool:
    """Returns whether the last, incomplete training batch of an epoch is dropped."""
    return config.profile == "release"


def resizes_twice(config: ConfigDict) -> bool:
    """Returns whether images are brought into the pixel limits by a resize of their own."""
    return config.profile == "release"
