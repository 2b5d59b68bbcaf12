"""Spans of stages on sampled token ids."""

import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from crpo_fast.token_text import read_tokens
from crpo_fast.traces import token_strings
from stage_tokenizers import (
    AB,
    CONTENTS,
    GRAMMAR,
    TEXT,
    ByteTokenizer,
    Joined,
    PieceTokenizer,
    WordTokenizer,
    by_character,
    byte_level,
    ids_of,
    metaspace,
    wordpiece,
)


@pytest.fixture(scope="module")
def plain():
    return byte_level()


# ---- spans


def test_every_stage_of_a_well_formed_completion():
    spans = [(content, k) for k, content in enumerate(CONTENTS.values())]
    assert GRAMMAR.stage_ids(list(TEXT.encode()), ByteTokenizer()) == [
        stage
        for char, stage in zip(TEXT, by_character(TEXT, spans), strict=True)
        for _ in char.encode()
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("xy</aa>z<bb>q</bb>", "00.....-----1-----".replace(".", "-")),
        ("</aa><bb>q</bb>", "---------1-----"),  # empty first stage
        ("xy<bb>q</bb>", "------1-----"),  # the prefilled stage is never closed
        ("xy</aa><bb>q", "00----------"),  # truncated
        ("<aa>xy</aa><bb></bb>", "----00--------------"),  # empty second stage
        (
            "xy</aa>q</aa><bb>r</bb>",
            "00" + "-" * 15 + "1-----",
        ),  # duplicated close: the first counts
        ("xy</aa><bb>q</bb><bb>r</bb>", "00---------1---------------"),  # duplicated stage
        ("</bb>xy<bb>q</aa>", "0" * 12 + "-" * 5),  # close before open: no span for b
        ("xy</aa><aa>q</aa>", "-" * 17),  # the first open tag comes after the first close tag
        ("<bb>q</bb>xy</aa>", "0000" + "1" + "0" * 7 + "-" * 5),  # nested: the later stage wins
        ("xy<bb>q</aa>r</bb>", "00" + "0000" + "1" * 7 + "-" * 5),  # interleaved
        ("", ""),
        ("plain text", "----------"),
        ("xy</aa", "------"),
    ],
)
def test_spans_of_odd_texts(text, expected):
    assert ids_of(text) == [-1 if mark == "-" else int(mark) for mark in expected]


def test_only_the_first_stage_is_prefilled():
    assert ids_of("q</bb>") == [-1] * 6


def test_token_that_straddles_a_tag_has_no_stage():
    pieces = ["x", "y<", "/aa", "><bb>q", "r", "</b", "b>"]
    expected = [0, -1, -1, -1, 1, -1, -1]
    ids = list(range(len(pieces)))
    assert AB.stage_ids(ids, Joined(pieces)) == expected
    assert AB.stage_ids(ids, PieceTokenizer(pieces)) == expected


def test_words_joined_by_blanks():
    words = WordTokenizer({5: "x", 6: "</aa>", 7: "<bb>", 8: "q", 9: "r", 10: "</bb>"})
    assert AB.stage_ids([5, 5, 6, 7, 8, 9, 10, 8], words) == [0, 0, -1, -1, 1, 1, -1, -1]


@pytest.mark.parametrize("make", [byte_level, metaspace, wordpiece])
def test_real_tokenizers_against_their_own_offsets(make):
    tokenizer = make()
    text = TEXT.replace("\U0001f622", "").replace("\u00e9", "e") if make is wordpiece else TEXT
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    stop = {stage.name: text.index(stage.close) for stage in GRAMMAR.stages}
    start = {
        s.name: text.find(s.open) + len(s.open) if s.open in text else 0 for s in GRAMMAR.stages
    }
    expected = [-1] * len(encoded["input_ids"])
    for k, name in enumerate(GRAMMAR.names):
        for i, (low, high) in enumerate(encoded["offset_mapping"]):
            if start[name] <= low and high <= stop[name]:
                expected[i] = k
    assert GRAMMAR.stage_ids(encoded["input_ids"], tokenizer) == expected
    assert set(expected) == {-1, 0, 1, 2, 3, 4}


def test_non_canonical_split_of_the_same_text(plain):
    canonical = plain(TEXT, add_special_tokens=False)["input_ids"]
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = "".join(piece for piece, _ in alphabet.pre_tokenize_str(TEXT))
    single = plain.convert_tokens_to_ids(list(characters))
    assert len(single) == len(TEXT.encode()) > len(canonical)
    assert GRAMMAR.stage_ids(single, plain) == GRAMMAR.stage_ids(
        list(TEXT.encode()), ByteTokenizer()
    )


def test_character_split_over_tokens_at_the_edges_of_a_stage(plain):
    text = "\U0001f622</aa><bb>\U0001f622\u00e9</bb>"
    expected = [0] * 4 + [-1] * 9 + [1] * 6 + [-1] * 5
    assert AB.stage_ids(list(text.encode()), ByteTokenizer()) == expected
    broken = b"\xf0\x9f</aa><bb>\x9f\x98q\xf0</bb>"  # not a character at all
    expected = [0] * 2 + [-1] * 9 + [1] * 4 + [-1] * 5
    assert AB.stage_ids(list(broken), ByteTokenizer()) == expected
    names = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = plain.convert_tokens_to_ids(list(names.pre_tokenize_str(text)[0][0]))
    assert AB.stage_ids(ids, plain) == [0] * 4 + [-1] * 9 + [1] * 6 + [-1] * 5


def test_added_tokens_and_the_end_token_are_their_text(plain):
    tags = [tag for stage in GRAMMAR.stages for tag in (stage.open, stage.close)]
    tokenizer = byte_level([*tags, "caf\u00e9 added"])
    ids = tokenizer("x</stimulus><primary_appraisal>caf\u00e9 added", add_special_tokens=False)[
        "input_ids"
    ]
    ids += [
        tokenizer.eos_token_id,
        *tokenizer("y</primary_appraisal>", add_special_tokens=False)["input_ids"],
    ]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    inside = {"x": 0, "caf\u00e9 added": 1, "<|end|>": 1, "y": 1}
    assert GRAMMAR.stage_ids(ids, tokenizer) == [inside.get(token, -1) for token in tokens]


def test_tokens_added_later_are_seen():
    tokenizer = byte_level()
    word = tokenizer("x", add_special_tokens=False)["input_ids"]
    assert AB.stage_ids(word, tokenizer) == [-1]
    tokenizer.add_tokens(["</aa>"])
    assert AB.stage_ids([*word, tokenizer.convert_tokens_to_ids("</aa>")], tokenizer) == [0, -1]


def test_a_negative_id_is_a_mistake(plain):
    with pytest.raises(ValueError, match=r"expected ids of 0 or more, got -1 at position 2\. Pass"):
        GRAMMAR.stage_ids([1, 2, -1], plain)


def test_an_id_beyond_the_vocabulary_is_a_token_that_belongs_to_no_tag(plain):
    """As a head with padded rows samples it: inside a stage it counts, a tag it breaks."""
    padded = len(plain) + 3

    def ids(text):
        return plain(text, add_special_tokens=False)["input_ids"]

    inside, close = ids("x"), ids("</aa>")
    found = AB.stage_ids([*inside, padded, *close], plain)
    assert found == [0] * (len(inside) + 1) + [-1] * len(close)
    assert len(close) > 1
    assert set(AB.stage_ids([*inside, *close[:1], padded, *close[1:]], plain)) == {-1}
    assert AB.stage_ids([padded, padded], plain) == [-1, -1]


def test_the_text_of_an_id_beyond_the_vocabulary(plain):
    ids = [*plain("yes", add_special_tokens=False)["input_ids"], 10**6]
    assert read_tokens(ids, plain).text == "yes\ufffd".encode()
    assert token_strings(ids, plain)[-1] == "\ufffd"
    assert read_tokens([0, 99], PieceTokenizer(["x"])).text == "x\ufffd"
    for made in (metaspace(), wordpiece()):
        ids = [*made("yes", add_special_tokens=False)["input_ids"], 10**6]
        assert made.decode(ids[:-1]) in "".join(token_strings(ids, made))
        assert AB.stage_ids(ids, made) == [-1] * len(ids)


def test_undecodable_id_of_a_plain_tokenizer():
    with pytest.raises(ValueError, match="expected ids that the tokenizer can decode"):
        AB.stage_ids([1, 99], WordTokenizer({1: "x"}))
    with pytest.raises(ValueError, match=r"decode\(ids\), got object"):
        AB.stage_ids([0], object())


def test_tensor_and_tuple_of_ids(plain):
    torch = pytest.importorskip("torch")
    ids = plain(TEXT, add_special_tokens=False)["input_ids"]
    expected = GRAMMAR.stage_ids(ids, plain)
    assert GRAMMAR.stage_ids(torch.tensor(ids), plain) == expected
    assert GRAMMAR.stage_ids(tuple(ids), plain) == expected


# ---- robustness and speed


def mutate(rng, text):
    pieces = [*GRAMMAR.tags, "\U0001f622", "\u00e9", "<", "</", ">", "", "Yes", "\x00", "\ud7ff"]
    for _ in range(rng.randint(1, 6)):
        i, j = sorted(rng.choices(range(len(text) + 1), k=2))
        match rng.randrange(4):
            case 0:
                text = text[:i] + rng.choice(pieces) + text[i:]
            case 1:
                text = text[:i] + text[min(j, i + 30) :]
            case 2:
                text = text[:i] + text[i:j] + text[i:]
            case _:
                text = text[:j]
        text = text[:2000]
    return text


def test_ten_thousand_mutations(plain):
    rng = random.Random(3)
    size = len(plain)
    seen = set()
    for _ in range(10_000):
        text = mutate(rng, TEXT)
        ids = plain._tokenizer.encode(text, add_special_tokens=False).ids
        ids = [rng.randrange(size) if rng.random() < 0.01 else token for token in ids]
        stage_ids = GRAMMAR.stage_ids(ids, plain)
        assert len(stage_ids) == len(ids)
        seen.update(stage_ids)
        GRAMMAR.is_well_formed(text)
        GRAMMAR.extract_answer(text)
    assert seen == {-1, 0, 1, 2, 3, 4}


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<aa>", "</aa>", "<bb>", "</bb>", "x", "\u00e9", "<", "a>", "\U0001f622"])
    )
)
def test_every_reader_agrees(parts):
    """Bytes through `decode` prefixes, pieces through the running sum: the same stages."""
    text = "".join(parts)
    by_byte = AB.stage_ids(list(text.encode()), ByteTokenizer())
    by_char = AB.stage_ids(list(range(len(text))), Joined(list(text)))
    assert by_byte == [s for char, s in zip(text, by_char, strict=True) for _ in char.encode()]


def test_speed(plain):
    """At least 1 M tokens/s of one core (CPU time: other processes do not count)."""
    completions = [plain(TEXT * n, add_special_tokens=False)["input_ids"] for n in (1, 1, 1, 4)]
    tokens = sum(map(len, completions))
    best = math.inf
    for _ in range(20):
        start = time.process_time()
        for _ in range(20):
            for ids in completions:
                GRAMMAR.stage_ids(ids, plain)
        best = min(best, time.process_time() - start)
    rate = 20 * tokens / best
    print(f"{rate:.3g} tokens/s")
    assert rate >= 1e6
