"""The base policy of faces, in small: both phases, what is saved, and what is refused."""

import io
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import fer2013
from emor3_jax.config import ConfigError
from emor3_jax.embedded import base_policy, faces
from emor3_jax.embedded.courses import COURSES
from emor3_jax.embedded.teacher import Teacher
from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models import Policy, load, save
from emor3_jax.models.qwen2_5_vl import layout, model
from emor3_jax.models.qwen2_5_vl.processor import ImageSettings, Processor

COUNT, HELD_OUT = 1064, 1024


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
    """A config for grey pictures of 16 pixels, whose brightness tells the label, one unlabelled."""
    path = tmp_path_factory.mktemp("faces") / "faces.parquet"
    rng = np.random.default_rng(0)
    rows = []
    for i in range(COUNT + 1):
        label = faces.LABELS[i % len(faces.LABELS)]
        grey = 30 * (i % len(faces.LABELS)) + rng.integers(0, 20, (16, 16))
        out = io.BytesIO()
        Image.fromarray(grey.astype(np.uint8)).save(out, "PNG")
        answer = label if i else "boredom"
        image = {"bytes": out.getvalue(), "path": None}
        rows.append({"images": [image], "problem": "<image>which emotion ?", "answer": answer})
    pq.write_table(pa.Table.from_pylist(rows), path)

    config = fer2013.get_config("base")
    config.compile_cache = ""
    config.data.path = str(path)
    config.data.size = 16
    config.model.update({"patch": 4, "window": 16})
    config.model.update({"vision_width": 32, "vision_layers": 1, "vision_heads": 1})
    config.model.update({"width": 32, "layers": 1, "heads": 2, "kv_heads": 1})
    config.look.update({"steps": 24, "warmup_steps": 2, "batch": 16, "learning_rate": 2e-2})
    config.update({"steps": 3, "warmup_steps": 1, "batch": 4})
    return config


@pytest.fixture(scope="module")
def teacher(config: ConfigDict) -> Teacher:
    """Of the pictures as they are, with a tokenizer that knows the whole course."""
    course = COURSES["faces"](config)
    tokenizer = train_tokenizer(course.corpus, 600)
    processor = Processor(tokenizer, ImageSettings(256, 256, patch_size=4))
    return Teacher.of(course, processor, base_policy.model_config(config, tokenizer), looks=True)


def labels_of(teacher: Teacher) -> dict[int, str]:
    """Returns which label each first token names."""
    tokens = teacher.processor.tokenizer(list(faces.LABELS), add_special_tokens=False).input_ids
    return {first[0]: label for first, label in zip(tokens, faces.LABELS, strict=True)}


def test_a_base_policy_of_faces_learns_to_look_then_its_lessons(
    config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    scores = base_policy.train(config, tmp_path / "policy")
    assert set(scores) == {"look", "begin", "describe", "consistency", "coherence"}
    # Brightness alone tells the label; by chance it would be 1 in 7.
    assert scores["look"] > 0.3 and scores["begin"] > 0.2
    told = capsys.readouterr().out
    assert "looking: step 24/24" in told and "lessons: step 3/3" in told
    assert f"{COUNT} images" in told
    policy = load(tmp_path / "policy")
    assert policy.config.vision.patch_size == 4 and policy.config.vision.window_size == 16
    _, grid = policy.processor.patches(Image.new("L", (48, 48)))
    assert grid == (1, 4, 4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(policy.params))


def test_a_stopped_run_goes_on_from_what_it_has_looked_at(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tokenizer of that policy, whatever the corpus says by now."""
    words = ["which emotion ?", *faces.LABELS, *faces.BROWS.values()]
    tokenizer = train_tokenizer([f"{word} {word}" for word in words], 400)
    shapes = base_policy.model_config(config, tokenizer)
    params = model.init_params(shapes, jax.random.key(7))
    processor = Processor(tokenizer, ImageSettings(256, 256, patch_size=4))
    save(Policy(shapes, params, processor), tmp_path / "looked")

    def no_lessons(config: ConfigDict, teacher: Teacher, params: dict, say: object) -> tuple:
        assert teacher.processor.tokenizer.get_vocab() == tokenizer.get_vocab()
        return params, {}

    monkeypatch.setattr(base_policy, "learn_lessons", no_lessons)
    assert set(base_policy.train(config, tmp_path)) == {"look", "begin"}
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path).params, params)

    other = ConfigDict(config.to_dict())
    other.model.layers = 2
    with pytest.raises(ConfigError, match=r"(?s)model.*looked; delete that folder"):
        base_policy.train(other, tmp_path)


def test_pictures_learned_from_are_warped_and_those_held_out_are_not(teacher: Teacher) -> None:
    course, processor, shapes = teacher.course, teacher.processor, teacher.shapes
    assert len(course.images) == COUNT and course.held_out == HELD_OUT
    teacher = teacher._replace(strength=1.0)
    label = labels_of(teacher)
    assert teacher.learned == COUNT - HELD_OUT

    def plain(rows: range) -> list[np.ndarray]:
        pictures = (processor.patches(course.images[row]) for row in rows)
        return [layout.window_layout(*picture, shapes.vision).patches for picture in pictures]

    learned = plain(range(teacher.learned))
    looks = [look for look, _ in zip(teacher.looks(16, seed=0), range(5), strict=False)]
    for found in looks:
        assert not any(np.allclose(x, y, atol=1e-3) for x in found.images.patches for y in learned)
    # Each row once in 40 before any comes again, as the labels tell.
    drawn = np.concatenate([look.names[:, 0] for look in looks])[: teacher.learned]
    assert sorted(label[int(x)] for x in drawn) == sorted(course.labels[: teacher.learned])
    again = next(teacher.looks(16, seed=0))
    np.testing.assert_array_equal(again.images.patches, looks[0].images.patches)
    np.testing.assert_array_equal(again.names, looks[0].names)

    held_out = list(teacher.held_out_looks(300))
    assert [len(look.names) for look in held_out] == [300, 300, 300, 124]
    wanted = plain(range(teacher.learned, teacher.learned + 300))
    np.testing.assert_allclose(held_out[0].images.patches, wanted, atol=1e-5)
    named = [label[int(x)] for x in held_out[0].names[:, 0]]
    assert named == list(course.labels[teacher.learned :][:300])


def test_lessons_are_about_the_pictures_that_they_come_with(teacher: Teacher) -> None:
    tokenizer, settings = teacher.processor.tokenizer, teacher.processor.images
    for lessons in (next(teacher.lessons(8, seed=0)), next(teacher.held_out_lessons(8, seed=0))):
        assert lessons.images.patches.shape[0] == 8
        for row in range(8):
            # The reply of the first question describes the face.
            tokens, start = lessons.questions.tokens[row, 0], lessons.questions.starts[row, 0]
            reply = tokenizer.decode(tokens[start : lessons.questions.lengths[row, 0]])
            label = faces.described(reply)
            assert labels_of(teacher)[int(lessons.names[row])] == label
            # Each label has its own brightness, 0 to 19 over 30 times its place.
            patch = np.asarray(lessons.images.patches[row]).reshape(-1, 3, 2 * 16)[:, 0]
            grey = (patch.mean() * settings.std[0] + settings.mean[0]) / settings.scale
            assert faces.LABELS[int(grey // 30)] == label


def test_a_policy_looks_where_its_descriptions_go_on(teacher: Teacher) -> None:
    course, tokenizer = teacher.course, teacher.processor.tokenizer
    prompt = tokenizer.decode(teacher.look_prompt().tokens[0])
    image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    assert prompt == image + "a face with"
    rng = np.random.default_rng(0)
    replies = [task.reply for row in range(7) for task in course.tasks(row, rng)]
    # Of five tasks a face one is to describe it and one to respond, which describes it first.
    begun = [prompt.removeprefix(image) in reply for reply in replies]
    assert np.mean(begun) == pytest.approx(2 / 5)
    # What a look predicts at the end is what a description goes on with.
    opened = tokenizer(course.opening, add_special_tokens=False).input_ids
    label = labels_of(teacher)
    begins = {name: set() for name in faces.LABELS}
    for each in faces.LABELS:
        for seed in range(20):
            told = faces.describe(each, np.random.default_rng(seed))
            tokens = tokenizer(told, add_special_tokens=False).input_ids
            assert tokens[: len(opened)] == opened
            begins[each].add(tokens[len(opened)])
    seen = {name: set() for name in faces.LABELS}
    for name, sight in np.concatenate([x.names for x in teacher.held_out_looks(256)]):
        seen[label[int(name)]].add(int(sight))
    assert seen == begins and all(len(tokens) == 1 for tokens in begins.values())
    assert len(set.union(*begins.values())) == len(faces.LABELS)
    # Without descriptions to look for, both predict the label.
    bare_course = course._replace(opening="", sights={})
    plain = Teacher.of(bare_course, teacher.processor, teacher.shapes, looks=True)
    looks = next(plain.held_out_looks(256))
    np.testing.assert_array_equal(looks.names[:, 1], looks.names[:, 0])


def test_the_opening_stands_as_far_from_the_picture_as_questions_put_it(teacher: Teacher) -> None:
    """Its three words move together, by up to 87 places, and nothing else does."""
    bare = teacher.look_prompt()
    prompts = teacher.look_prompts(seed=0)
    moved = np.stack([next(prompts).positions[0] - bare.positions[0] for _ in range(400)])
    assert not moved[:, :-3].any() and (moved[:, -3:] == moved[:, -1:, :1]).all()
    rooms = moved[:, -1, 0]
    assert rooms.min() >= 0 and 80 < rooms.max() < 88 and len(set(rooms.tolist())) > 40


@pytest.mark.parametrize(
    ("changes", "named"),
    (
        ({"data.kind": "cats"}, r"data\.kind.*emoscenes, faces"),
        ({"model.window": 12}, r"model\.window.*12.*multiple of 8"),
        ({"model.vision_heads": 3}, r"model\.vision_heads.*3.*vision_width=32.*multiple of 4"),
        ({"model.vision_heads": 0}, r"model\.vision_heads.*0.*8 or more"),
        ({"model.vision_heads": 8}, r"model\.vision_heads.*8.*8 or more"),
        ({"look.mix": -0.1}, r"look\.mix.*-0\.1.*0, for none"),
        ({"look.erase": 1.5}, r"look\.erase.*1\.5.*a chance"),
        ({"rates.tower": 0.0}, r"rates\.tower.*0\.0.*over 0"),
        ({"steps": 1}, r"steps.*over warmup_steps=1"),
        ({"look.steps": 2}, r"look\.steps.*over look\.warmup_steps=2"),
    ),
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    config: ConfigDict, tmp_path: Path, changes: dict, named: str
) -> None:
    wrong = ConfigDict(config.to_dict())
    wrong.update_from_flattened_dict(changes)
    wrong.data.path = "nowhere.parquet"
    with pytest.raises(ConfigError, match=named):
        base_policy.train(wrong, tmp_path)
