import re

import numpy as np
import pytest

from emor3_jax.data import prompts
from emor3_jax.embedded.emoscenes import scene as scenes
from emor3_jax.embedded.emoscenes import tasks, words
from emor3_jax.embedded.emoscenes.scene import STYLES
from emor3_jax.embedded.tasks import BROKEN_FORMAT
from emor3_jax.embedded.tokenizer import train_tokenizer

FORMAT = re.compile(
    r"<step1>.*</step1>.*<step2>.*</step2>.*<step3>.*</step3>.*\\boxed\{.*\}.*", re.DOTALL
)
N = 3000


def _scenes(style, n=N):
    rng = np.random.default_rng(7)
    return [scenes.sample(style, rng) for _ in range(n)]


@pytest.mark.parametrize("style", STYLES)
def test_habit_is_biased_but_never_certain(style):
    names = np.asarray(scenes.labels(style))
    named = []
    for scene in _scenes(style, 300):
        p = tasks.habit(scene)
        np.testing.assert_allclose(p.sum(), 1)
        assert 0.04 <= p.min() < p.max() < 0.85
        named.append(names[p.argmax()])
    # Two of the labels take most of the scenes.
    _, counts = np.unique(named, return_counts=True)
    assert np.sort(counts)[-2:].sum() > 0.7 * len(named)


def test_habit_leaves_much_to_learn():
    sampled, likeliest = tasks.habit_accuracy("drawn")
    assert 0.25 < sampled < likeliest < 0.4
    assert scenes.best_accuracy("drawn") > likeliest + 0.5


@pytest.mark.parametrize("style", STYLES)
def test_responses_are_as_mediocre_as_documented(style):
    rng = np.random.default_rng(0)
    found = _scenes(style)
    responses = [tasks.mediocre_response(scene, rng) for scene in found]
    good = [bool(FORMAT.fullmatch(r)) for r in responses]
    assert abs(np.mean(good) - (1 - BROKEN_FORMAT)) < 0.03
    boxes = [re.search(r"\\boxed\{(\w+)\}", r) for r in responses]
    assert abs(np.mean([b is None for b in boxes]) - BROKEN_FORMAT / 5) < 0.02
    right = [b[1] == s.label for b, s in zip(boxes, found, strict=True) if b]
    assert abs(np.mean(right) - tasks.habit_accuracy(style)[0]) < 0.03
    assert {b[1] for b in boxes if b} == set(scenes.labels(style))


def test_answers_often_contradict_the_feeling():
    rng = np.random.default_rng(0)
    feelings = {label: {words.feeling(label, rng) for _ in range(400)} for label in LABELS}
    of = {phrase: label for label, phrases in feelings.items() for phrase in phrases}
    pairs = []
    for scene in _scenes("drawn"):
        response = tasks.mediocre_response(scene, rng)
        if FORMAT.fullmatch(response):
            felt = of[re.search(r"<step2> (.*) </step2>", response)[1]]
            pairs.append((felt, re.search(r"\\boxed\{(\w+)\}", response)[1]))
    assert 0.28 < np.mean([felt != answer for felt, answer in pairs]) < 0.4


LABELS = scenes.labels("drawn")


@pytest.mark.parametrize("style", STYLES)
def test_examples_of_a_scene(style):
    rng = np.random.default_rng(0)
    for scene in _scenes(style, 100):
        found = tasks.scene_examples(scene, rng)
        assert [t.kind for t in found] == [
            "describe",
            "consistency",
            "consistency",
            "coherence",
            "set",
        ]
        describe, true, false, coherence, response = found
        assert set(scene.cues().values()) <= set(describe.reply.split())
        assert (true.reply, false.reply) == ("yes", "no")
        assert set(scene.cues().values()) <= set(true.question.split())
        assert not set(scene.cues().values()) <= set(false.question.split())
        assert coherence.reply in scenes.labels(style)
        assert [t.with_image for t in found] == [True, True, True, False, True]
        assert all(t.weight > 0 for t in found)
        assert response.question == tasks.set_question(style)
        assert all(label in response.question for label in scenes.labels(style))


def test_text_judge_follows_feelings_and_infers_where_none_is_named():
    rng = np.random.default_rng(0)
    vague = {words.vague_feeling(rng) for _ in range(50)}
    feelings = {label: {words.feeling(label, rng) for _ in range(400)} for label in LABELS}
    inferred = 0
    for scene in _scenes("drawn", 400):
        task = tasks.scene_examples(scene, rng)[3]
        felt = re.search(r"<step2> (.*) </step2>", task.question)[1]
        inferred += felt in vague
        assert felt in vague or felt in feelings[task.reply]
    assert abs(inferred / 400 - tasks.VAGUE_FEELING) < 0.08


def test_questions_are_those_of_training():
    """A judged text has the same tokens in a whole question as between its rendered parts."""
    tokenizer = train_tokenizer(tasks.text_corpus(scenes_per_style=60), 1200)
    templates = tasks.templates()
    text = "<step1> calm man sitting by a flower under sun , bright and vivid </step1>"
    for template, with_image in (
        (templates.reflections["coherence"], False),
        (templates.reflections["consistency"], True),
    ):
        head, tail = prompts.reflection_parts(tokenizer, template, LABELS, with_image)
        question = prompts.fill(template, labels=LABELS, text=text)
        turn = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        if with_image:
            turn[0]["content"].insert(0, {"type": "image"})
        chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.encode(chat)
        parts = [*head, *tokenizer.encode(text), *tail]
        assert whole[-len(parts) :] == parts
    assert all(
        len(tokenizer.encode(prompts.fill(t, question="", labels=(), text=""))) <= 30
        for t in (templates.set, *templates.reflections.values())
    )


def test_corpus_is_seeded():
    assert tasks.text_corpus(20, seed=1) == tasks.text_corpus(20, seed=1)
    assert tasks.text_corpus(20, seed=1) != tasks.text_corpus(20, seed=2)
