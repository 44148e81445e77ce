"""The token tables say what the plain-Python rules say, on thousands of hostile texts."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emor3_jax import rewards
from emor3_jax.rewards import automaton, rules, spans
from emor3_jax.rewards.combine import coherence_score, combine, consistency_score

BATCHES = 24
QUIET = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def check(rows, speller, tables, tools, oracle, labels) -> dict[str, np.ndarray]:
    """Compares all rules on rows of ids, spans byte for byte; returns what was read."""
    said = jax.tree.map(np.asarray, tools.read_all(tables, *tools.pad(rows, filler=1)))
    for i, ids in enumerate(rows):
        code = speller.read(ids)
        text = code.decode("utf-8", "replace")
        wanted = (oracle.format_score(text), oracle.answer(text, labels))
        assert (said["response"][0][i], said["response"][1][i]) == wanted, repr(code)
        assert said["label"][i] == oracle.reply_label(text, labels), repr(code)
        assert said["yes_no"][i] == oracle.yes_no(text), repr(code)
        # Each invalid byte is a character of its own here, so that bytes can be told apart.
        raw = code.decode("utf-8", "surrogateescape")
        for name in ("coherence", "consistency"):
            span, expected = said[name], getattr(oracle, f"{name}_text")(raw)
            assert span.found[i] == (expected is not None), (name, code)
            written = speller.read(span.tokens[i, : span.lengths[i]])
            assert written == (expected or "").encode("utf-8", "surrogateescape"), (name, code)
            assert not span.tokens[i, span.lengths[i] :].any()
    return said


def test_rules_on_grammar_texts(speller, tables, tools, oracle, labels):
    rng = random.Random(11)
    counts = np.zeros(6)
    for _ in range(BATCHES):
        texts = [tools.make_text(rng) for _ in range(tools.rows)]
        rows = [speller.spell(text.encode(), rng) for text in texts]
        said = check(rows, speller, tables, tools, oracle, labels)
        counts += [
            said["response"][0].sum(),
            (said["response"][1] >= 0).sum(),
            (said["label"] >= 0).sum(),
            (said["yes_no"] >= 0).sum(),
            said["coherence"].found.sum(),
            said["consistency"].found.sum(),
        ]
    # The texts reach both outcomes of every rule.
    share = counts / (BATCHES * tools.rows)
    assert np.all(share > [0.2, 0.1, 0.01, 0.1, 0.3, 0.3]), share
    assert np.all(share < 0.9), share


def test_rules_on_random_bytes_and_ids(speller, tables, tools, oracle, labels):
    """Half of characters, tags cut by invalid bytes, any token after any other."""
    rng = random.Random(12)
    for batch in range(6):
        rows = []
        for _ in range(tools.rows):
            if batch % 2:
                rows.append([rng.randrange(len(speller.bytes)) for _ in range(rng.randrange(60))])
                continue
            code = bytearray(tools.well_formed(rng).encode())
            for _ in range(rng.randrange(1, 5)):
                at = rng.randrange(len(code))
                code[at : at + rng.randrange(2)] = rng.choice(
                    [b"\xe2", b"\xe2\x80", b"\xc2", b"\xff", b"\x80", b"\xe2\x80 ", b"\xc2\xc2\xa0"]
                )
            rows.append(speller.spell(bytes(code[: tools.width]), rng))
        check(rows, speller, tables, tools, oracle, labels)


@QUIET
@given(data=st.data())
def test_rules_on_drawn_texts(data, straddling, build_tables, tools, oracle, labels):
    """As above with hypothesis, which makes a failing text short."""
    pieces = ["joy", "Sky", " blue", " ", "\u2003", "<", "/", ">", "é", "step", *oracle.MARKS]
    piece = st.sampled_from(pieces)
    text = st.lists(piece | st.characters(exclude_categories=["Cs"]), max_size=20).map("".join)
    texts = data.draw(st.lists(text, min_size=8, max_size=32))
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    rows = [straddling.spell(text.encode()[: tools.width], rng) for text in texts]
    check(rows, straddling, build_tables(straddling), tools, oracle, labels)


def test_format_is_the_regular_expression(oracle, tools):
    """The search that the oracle does is the rule's expression, on texts where that is fast."""
    rng = random.Random(13)
    checked = 0
    for _ in range(4000):
        text = tools.make_text(rng)
        if all(text.count(mark) <= 2 for mark in oracle.MARKS):
            checked += 1
            assert oracle.format_score(text) == oracle.format_by_regex(text), text
    assert checked > 3000


def test_decoding_is_the_tokenizer_s(speller):
    """The bytes of tokens are what the tokenizer decodes to, special tokens skipped."""
    rng = random.Random(14)
    for _ in range(300):
        ids = [rng.randrange(len(speller.bytes)) for _ in range(rng.randrange(1, 30))]
        decoded = speller.tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded == speller.read(ids).decode("utf-8", "replace")


def test_tokens_do_straddle_tags(straddling):
    codes = straddling.bytes
    assert any(b"><" in code or b"> <" in code for code in codes)
    assert any(b">" in code[1:-1] and not code.startswith(b"<") for code in codes)
    assert any(b"<s" in code and not code.startswith(b"<") for code in codes)


def test_hostile_text_is_linear(straddling, build_tables, tools):
    """Repeated steps without a box cost a backtracking expression seconds; here, nothing extra."""
    steps = "".join(f"<step{i}></step{i}>" for i in (1, 2, 3))
    single = {code: ids[0] for code, ids in straddling.ids.items() if len(code) == 1}
    code = (steps * 64).encode()[:3072]
    tokens = jnp.asarray([[single[bytes([b])] for b in code]])
    said = rewards.score_response(build_tables(straddling), tokens, jnp.asarray([len(code)]))
    assert said[0][0] == 0 and said[1][0] == -1


def test_padding_is_not_read(speller, tables, tools):
    rows = [speller.spell(b"<step1></step1><step2>", random.Random(0)), []]
    end = speller.ids[b"}"][0]
    for name, value in tools.read_all(tables, *tools.pad(rows, filler=end)).items():
        plain = tools.read_all(tables, *tools.pad(rows, filler=0))[name]
        jax.tree.map(np.testing.assert_array_equal, value, plain)


def test_nothing_crosses_to_the_host(straddling, build_tables, tools):
    """All rules, both scores and the reward are one program on device arrays."""

    @jax.jit
    def reward(tables, tokens, lengths, target):
        said = tools.read_all(tables, tokens, lengths)
        format_, answer = said["response"]
        coherence = coherence_score(said["label"], target, said["coherence"].found, "release")
        consistency = consistency_score(said["yes_no"], said["consistency"].found, "release")
        accuracy = (answer == target).astype(jnp.float32)
        return combine(format_, accuracy, [coherence, consistency], profile="release")

    tables = build_tables(straddling)
    text = b"<step1>a</step1><step2>b</step2><step3>c</step3>\\boxed{joy}"
    tokens, lengths = tools.pad([straddling.spell(text, random.Random(0))])
    target = jnp.zeros(tools.rows, jnp.int32)
    with jax.transfer_guard("disallow"):
        overall = reward(tables, tokens, lengths, target)
    # Format and accuracy are right; the text itself is neither a label nor a yes or no.
    assert overall[0] == pytest.approx(0.9 + 0.1 * (0 + 0.5))


def test_closure_finds_only_what_bytes_reach():
    states, table = automaton.close(0, lambda s, byte: min(2, s + 1) if byte == 7 else s)
    assert states == [0, 1, 2]
    assert table[:, 7].tolist() == [1, 2, 2] and table[:, 8].tolist() == [0, 1, 2]
    columns = automaton.compose(table, [b"\x07\x07", b"\x08", b""])
    assert columns.tolist() == [[2, 0, 0, 0], [2, 1, 1, 1], [2, 2, 2, 2]]
    (merged,), token_class = automaton.classify([columns])
    assert merged.shape == (3, 2)
    assert token_class[1] == token_class[2] == token_class[3] != token_class[0]


def test_states_that_act_alike_are_merged():
    """Count to two, saturating, by two numberings of the same counts; only "two" has a result."""
    table = np.asarray([[3, 0], [2, 1], [2, 2], [4, 3], [4, 4], [2, 5]], np.int32)
    following, outputs = automaton.merge(table, np.asarray([0, 0, 1, 0, 1, 0], np.int32))
    # 0 counts none, 1 and 3 and 5 one, 2 and 4 two.
    assert outputs.tolist() == [0, 0, 1]
    assert following.tolist() == [[1, 0], [2, 1], [2, 2]]


def test_span_needs_all_bytes():
    with pytest.raises(rewards.TokenizerError, match="no token for the byte 0x01"):
        spans.build_spans([b"\x00", b"ab"])


def test_kelvin_and_whitespace_are_in_the_alphabet():
    alphabet = rules.BoxRule(["kelvin"]).alphabet
    assert "\u212a" in alphabet and "\u3000" in alphabet and "é" not in alphabet
