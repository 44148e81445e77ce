"""What the profile decides, the release's order of words re-stated by hand."""

import pytest
from support import tiny

from emor3_jax import prepare
from emor3_jax.config import ConfigError, default
from emor3_jax.data.prompts import PromptTemplates, reflection_parts
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models import LoadedPolicy, save
from emor3_jax.models.processor import ImageSettings, Processor
from emor3_jax.prepare import profile
from emor3_jax.prepare.checks import validate
from emor3_jax.prepare.inference import inference_settings
from emor3_jax.rollout.reflect import prompt_questions

MIKELS = ("amusement", "awe", "contentment", "excitement", "anger", "disgust", "fear", "sadness")
ALPHABETICAL = "amusement, anger, awe, contentment, disgust, excitement, fear, sadness"
ORDER = {
    "coherence": ("[steps]", "Which one", ALPHABETICAL, "Reply"),
    "consistency": ("<|vision_end|>", "Do they describe", "Reply", "[steps]"),
}
"""The release: text, then question and labels by the alphabet; image, question, then text."""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["which emotion is this ? yes or no"], 300)


def config_of(name: str):
    config = default()
    config.profile = name
    return config


def asked(tokenizer, config, name: str) -> str:
    """The user's turn of a reflection, with [steps] for the judged text."""
    template = prepare.load_templates(config).reflections[name]
    labels = prepare.listed_labels(config, MIKELS)
    parts = reflection_parts(tokenizer, template, labels, with_image=name == "consistency")
    image = "<|vision_end|>" if name == "consistency" else ""
    return image + "[steps]".join(map(tokenizer.decode, parts))


@pytest.mark.parametrize("name", ORDER)
def test_the_release_asks_in_its_own_order(tokenizer, name):
    text = asked(tokenizer, config_of("release"), name)
    places = [text.index(piece) for piece in ORDER[name]]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ORDER)
def test_the_paper_asks_with_the_text_in_the_middle(tokenizer, name):
    text = asked(tokenizer, config_of("paper"), name)
    assert text.index("Someone wrote") < text.index("[steps]") < text.index("Reply")
    assert name == "consistency" or ", ".join(MIKELS) in text
    stated = config_of("release")
    stated.data.templates[name] = "qwen"
    assert asked(tokenizer, stated, name).startswith(text.partition("[steps]")[0])


def test_the_order_of_labels_is_only_that_of_the_words(tokenizer):
    templates = PromptTemplates.load(coherence="release", consistency="release")
    plain = prompt_questions(tokenizer, templates, MIKELS)
    listed = prompt_questions(tokenizer, templates, MIKELS, sorted(MIKELS))
    assert ALPHABETICAL in tokenizer.decode(listed[0].tail)
    assert ALPHABETICAL not in tokenizer.decode(plain[0].tail)
    for one, other in zip(plain, listed, strict=True):
        assert one.candidates.meaning.tolist() == other.candidates.meaning.tolist()
        assert one.candidates.tokens.tolist() == other.candidates.tokens.tolist()


@pytest.mark.parametrize(("name", "reply", "sampling"), [
    ("paper", 8, (0.0, 1.0)),
    ("release", 2048, (0.6, 0.95)),
])  # fmt: skip
def test_what_is_left_open_is_the_profiles(name, reply, sampling):
    config = config_of(name)
    validate(config)
    assert prepare.make_reply_sampling(config, (1,)).max_tokens == reply
    made = prepare.make_evaluation_sampling(config, (1,))
    assert (made.temperature, made.top_p) == sampling
    assert made.max_tokens == 2048
    assert profile.drops_last_batch(config) == profile.resizes_twice(config) == (name == "release")


@pytest.mark.parametrize("name", ["paper", "release"])
def test_what_the_config_states_holds_in_both(name):
    config = config_of(name)
    config.reflect.max_tokens = 5
    config.evaluate.temperature = 1.0
    assert profile.reply_tokens(config) == 5
    assert profile.evaluation_sampling(config) == (1.0, 1.0)
    config.evaluate.temperature, config.evaluate.top_p = 0.0, 0.5
    assert profile.evaluation_sampling(config) == (0.0, 0.5)
    config.data.templates.coherence = "tiny"
    assert profile.template_names(config)["coherence"] == "tiny"


def test_votes_need_responses_that_differ():
    config = config_of("release")
    config.evaluate.votes = 3
    validate(config)
    config.profile = "paper"
    with pytest.raises(ConfigError, match=r"evaluate\.votes=3: .*raise evaluate\.temperature"):
        validate(config)


def test_the_release_resizes_first_and_leaves_the_folders_limits(tmp_path, tokenizer):
    policy = tiny.make_policy()
    images = ImageSettings(patch_size=4, min_pixels=64, max_pixels=4096)
    processor = Processor(tokenizer, images, policy.layout)
    save(LoadedPolicy(policy, tiny.strong_params(policy), processor), tmp_path)

    def settings(name: str, **limits) -> ImageSettings:
        config = config_of(name)
        config.policy.path = str(tmp_path)
        config.data.update(limits)
        return prepare.read_policy(config, print).processor.images

    limits = {"min_pixels": 256, "max_pixels": 1024}
    found = settings("release", **limits)
    assert (found.min_pixels, found.max_pixels, found.first_resize) == (64, 4096, (256, 1024))
    found = settings("paper", **limits)
    assert (found.min_pixels, found.max_pixels, found.first_resize) == (256, 1024, None)
    assert settings("release").first_resize is None


@pytest.mark.parametrize(
    ("name", "limits", "found"),
    [
        ("release", (256, 1024), (256, 1024)),
        ("release", (0, 0), None),
        ("paper", (256, 1024), None),
    ],
)
def test_who_asks_the_policy_later_resizes_likewise(name, limits, found):
    config = config_of(name)
    config.data.min_pixels, config.data.max_pixels = limits
    assert inference_settings(config, ("joy", "fear")).first_resize == found
