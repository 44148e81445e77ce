import copy

import pytest

from emor3_jax.data.errors import DataError
from emor3_jax.data.prompts import (
    BUILT_IN,
    PLAIN_STYLES,
    SET_STYLES,
    PromptTemplates,
    fill,
    opened_tag,
    reflection_parts,
    render_prompt,
    shared_length,
)

LABELS = ("joy", "fear")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_load_and_name_all_labels(name, tokenizer):
    templates = PromptTemplates.load(name, name, name)
    prompt = tokenizer.decode(render_prompt(tokenizer, templates.set, "what ?", LABELS, 4))
    head, tail = reflection_parts(tokenizer, templates.reflections["coherence"], LABELS, False)
    question = tokenizer.decode(head) + tokenizer.decode(tail)
    assert "what ?" in prompt and "joy, fear" in prompt and "joy, fear" in question


def test_prompt_is_rendered_as_qwen_does_with_the_image_first(tokenizer):
    tokens = render_prompt(tokenizer, "{question} of {labels}", "which", LABELS, 3)
    assert tokenizer.decode(tokens) == (
        SYSTEM + "<|vision_start|>" + "<|image_pad|>" * 3 + "<|vision_end|>which of joy, fear"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    end = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    assert tokens[shared_length(tokenizer, tokens) - 1] == end


def test_prompt_without_a_image(tokenizer):
    tokens = render_prompt(tokenizer, "{question}", "hello", LABELS, 0)
    assert tokenizer.decode(tokens) == SYSTEM + "hello<|im_end|>\n<|im_start|>assistant\n"


def test_consistency_question_starts_with_the_prompts_own_prefix(tokenizer):
    template = "say {text} fits ?"
    head, tail = reflection_parts(tokenizer, template, LABELS, True)
    prompt = render_prompt(tokenizer, "{question}", "which", LABELS, 3)
    whole = render_prompt(tokenizer, "{question}", "say sun fits ?", LABELS, 3)
    n = shared_length(tokenizer, prompt)
    assert whole[:n] == prompt[:n]
    text = tokenizer.encode("sun")
    joined = prompt[:n] + head + text + tail
    assert tokenizer.decode(joined) == tokenizer.decode(whole)
    assert tokenizer.decode(head) == "say "


def test_head_is_empty_where_the_text_follows_the_image(tokenizer):
    head, tail = reflection_parts(tokenizer, "{text} fits ?", LABELS, True)
    assert head == []
    assert tokenizer.decode(tail) == " fits ?<|im_end|>\n<|im_start|>assistant\n"


def test_coherence_question_has_its_system_turn_and_no_image(tokenizer):
    head, tail = reflection_parts(tokenizer, "of {labels} : {text}", LABELS, False)
    assert tokenizer.decode(head) == SYSTEM + "of joy, fear : "
    assert tokenizer.decode(tail) == "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("opened", "tag"), [("", None), ("<think>\\n", "<think>")])
def test_a_tag_that_the_chat_template_opens_is_found(tokenizer, opened, tag):
    thinking = copy.copy(tokenizer)
    before = tokenizer.chat_template
    thinking.chat_template = before.replace("assistant\\n'", f"assistant\\n{opened}'")
    assert (thinking.chat_template == before) == (not opened)
    assert opened_tag(thinking) == tag


def test_filled_in_values_are_not_read_as_placeholders():
    assert fill("{question} \\boxed{label}", question="{labels}") == "{labels} \\boxed{label}"


def test_special_tokens_in_a_question_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"<\|image_pad\|>"):
        render_prompt(tokenizer, "{question}", "two <|image_pad|>", LABELS, 3)


def test_special_tokens_in_a_template_are_refused(tokenizer):
    with pytest.raises(DataError, match="renders 2"):
        render_prompt(tokenizer, "{question} <|image_pad|>", "which", LABELS, 3)


def test_a_chat_template_without_images_is_refused(tokenizer):
    kept = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    try:
        with pytest.raises(DataError, match=r"renders 0 <\|image_pad\|> for 1 image"):
            reflection_parts(tokenizer, "{text}", LABELS, True)
    finally:
        tokenizer.chat_template = kept


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("coherence", "{labels}", r"must contain \{text\}"),
        ("coherence", "{text}", r"must contain \{labels\}"),
        ("consistency", "{text} {labels}", r"unknown placeholder \{labels\}.*knows \{text\}"),
        ("consistency", "{text} and {text}", r"\{text\} only once"),
        ("set", "{questoin} {question}", r"unknown placeholder \{questoin\}"),
        ("set", "{labels}", r"must contain \{question\}"),
        ("set", "{question} {}", r"unknown placeholder \{\}"),
    ],
)
def test_faults_of_a_template_name_file_and_rule(tmp_path, kind, text, message):
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"mine\.txt.*{message}"):
        PromptTemplates.load(**{kind: path})


def test_own_files_keep_what_boxed_holds(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("{question}\nthen \\boxed{one word}\n")
    assert PromptTemplates.load(set=path).set == "{question}\nthen \\boxed{one word}"


def test_a_missing_template_names_the_choices():
    with pytest.raises(DataError, match=r"set='quen'.*qwen, tiny, think, direct, tiny_direct"):
        PromptTemplates.load(set="quen")
    # Only the question about the emotion has other styles.
    with pytest.raises(DataError, match=r"coherence='think'.*one of qwen, tiny, release$"):
        PromptTemplates.load(coherence="think")


@pytest.mark.parametrize("style", SET_STYLES)
def test_other_ways_to_ask_are_choices(style):
    template = PromptTemplates.load(set=style).set
    asked = fill(template, question="what ?", labels=LABELS)
    assert "what ?" in asked and "joy, fear" in asked and "\\boxed{" in asked
    assert ("<think>" in asked) == (style == "think")
    assert ("<step1>" in asked) == (style not in PLAIN_STYLES)


@pytest.mark.parametrize(
    ("style", "tags"), [("confidence", ["confidence"]), ("valence_arousal", ["valence", "arousal"])]
)
def test_numbers_are_asked_for_in_tags(style, tags):
    template = PromptTemplates.load(set=style).set
    assert all(f"<{tag}>number</{tag}>" in template for tag in tags)
