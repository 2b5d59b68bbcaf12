"""Stages: grammar, schedule, format, and spans on sampled token ids."""

import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from crpo_fast.stage_presets import PRESETS
from crpo_fast.stages import Stage, StageGrammar

GRAMMAR = StageGrammar.preset("mental_r1")
AB = StageGrammar(stages=(Stage("a", "aa"), Stage("b", "bb")))
CONTENTS = {
    "stimulus": "lost the job; \U0001f622 caf\u00e9",
    "primary_appraisal": "a threat",
    "secondary_appraisal": "friends help",
    "reaction": "fear, \u4e0d\u5b89",
    "mental_state": "stressed",
}
TEXT = GRAMMAR.render(CONTENTS, "Yes")


class ByteTokenizer:
    """One id per byte; only `decode`."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


class WordTokenizer:
    """Pieces by id, joined by blanks; a plain dict and only `decode`."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids):
        return " ".join(self.pieces[i] for i in ids)


class PieceTokenizer:
    """Only `convert_ids_to_tokens`."""

    def __init__(self, pieces):
        self.pieces = pieces

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[i] if i < len(self.pieces) else None for i in ids]


class Joined(PieceTokenizer):
    """Pieces by id, concatenated; unhashable, so nothing can be remembered about it."""

    __hash__ = None
    convert_ids_to_tokens = None

    def decode(self, token_ids, skip_special_tokens=True):
        assert not skip_special_tokens
        return "".join(self.pieces[i] for i in token_ids)


def corpus():
    words = [
        "lost",
        "the",
        "job",
        "a",
        "threat",
        "friends",
        "help",
        "fear",
        "caf\u00e9",
        "stressed",
    ]
    words += ["<think>", "<answer>", "Yes", "No", "\u4e0d\u5b89"]
    rng = random.Random(0)
    return [" ".join(rng.choices(words, k=12)) for _ in range(200)] + [TEXT]


def byte_level(added=()):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return tokenizer


def metaspace():
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    vocab = [(token, 0.0) for token in ["<unk>", "</s>", *bytes_]]
    vocab += [
        (piece, -2.0)
        for piece in ["\u2581", "\u2581the", "\u2581a", "\u2581threat", "th", "e", "r", "a", "t"]
    ]
    vocab += [(piece, -3.0) for piece in "<>/_stimulprybconwdgk"]
    core = Tokenizer(models.Unigram(list(dict(vocab).items()), unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def wordpiece():
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"])
    core.train_from_iterator(corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="[SEP]")
    tags = [tag for stage in GRAMMAR.stages for tag in (stage.open, stage.close)]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return tokenizer


@pytest.fixture(scope="module")
def plain():
    return byte_level()


def by_character(text, spans):
    """Oracle: what each character's stage is, from spans given as (needle, stage)."""
    stages = [-1] * len(text)
    for needle, stage in spans:
        at = text.index(needle)
        stages[at : at + len(needle)] = [stage] * len(needle)
    return stages


def ids_of(text, grammar=AB):
    """Stage of every character of an ASCII text."""
    return grammar.stage_ids(text.encode(), ByteTokenizer())


# ---- schedule


def test_default_coefs_are_the_papers():
    expected = [-0.059197, -0.054309, -0.027727, 0.027727, 0.054309]
    assert GRAMMAR.coefs() == pytest.approx(expected, abs=5e-7)
    assert sum(GRAMMAR.coefs()) == pytest.approx(-0.059197, abs=5e-7)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [-0.2, -0.12, -0.04, 0.04, 0.12]),
        ("cosine", [-0.2 * math.sin(math.pi * x / 5) for x in (2.5, 1.5, 0.5, -0.5, -1.5)]),
        ("step", [-0.2, -0.2, -0.2, 0.2, 0.2]),
    ],
)
def test_other_schedules(schedule, expected):
    grammar = StageGrammar.preset("mental_r1", schedule=schedule, magnitude=0.2)
    assert grammar.coefs() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["tanh", "linear", "cosine", "step"])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("tau", [None, 0.0, 1.0, 2.0, 4.5, 9.0])
def test_schedules_are_bounded_and_odd_about_tau(schedule, count, tau):
    stages = tuple(Stage(f"s{k}x") for k in range(1, count + 1))
    coefs = StageGrammar(stages, schedule, 0.3, tau).coefs()
    centre = (count + 2) / 2 if tau is None else tau
    assert all(abs(beta) <= 0.3 + 1e-12 for beta in coefs)
    assert coefs == sorted(coefs)
    for k, beta in enumerate(coefs, 1):
        mirror = 2 * centre - k
        if mirror in range(1, count + 1):
            assert beta == pytest.approx(-coefs[int(mirror) - 1], abs=1e-12)


def test_zero_magnitude_is_plus_zero():
    coefs = StageGrammar.preset("mental_r1", magnitude=0.0).coefs()
    assert coefs == [0.0] * 5
    assert all(math.copysign(1, beta) == 1 for beta in coefs)


def test_stage_coef_replaces_the_schedule():
    stages = (Stage("a", "aa", coef=0.5), Stage("b", "bb"))
    assert StageGrammar(stages).coefs() == pytest.approx([0.5, 0.0])
    both = (Stage("a", "aa", coef=0.5), Stage("b", "bb", coef=-1.0))
    assert StageGrammar(both, "explicit").coefs() == [0.5, -1.0]


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


@pytest.mark.parametrize("bad", [10**6, -1])
def test_id_outside_the_vocabulary(plain, bad):
    with pytest.raises(
        ValueError, match=rf"expected ids from 0 to \d+, got {bad} at position 2.*tokenizer"
    ):
        GRAMMAR.stage_ids([1, 2, bad], plain)


def test_undecodable_id_of_a_plain_tokenizer():
    with pytest.raises(ValueError, match="expected ids that the tokenizer can decode"):
        AB.stage_ids([1, 99], WordTokenizer({1: "x"}))
    with pytest.raises(ValueError, match="got 99 at position 1"):
        AB.stage_ids([0, 99], PieceTokenizer(["x"]))
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
    """Target >= 1 M tokens/s on one core; the bound here leaves room for a busy machine."""
    completions = [plain(TEXT * n, add_special_tokens=False)["input_ids"] for n in (1, 1, 1, 4)]
    tokens = sum(map(len, completions))
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(20):
            for ids in completions:
                GRAMMAR.stage_ids(ids, plain)
        best = min(best, time.perf_counter() - start)
    rate = 20 * tokens / best
    print(f"{rate:.3g} tokens/s")
    assert rate >= 1e6


# ---- format


def test_render_follows_the_prefill_and_is_well_formed():
    assert GRAMMAR.prefill == "<think>\n<stimulus>"
    assert TEXT.startswith("lost the job;")
    assert TEXT.endswith("</mental_state></think><answer>Yes</answer>")
    assert GRAMMAR.is_well_formed(TEXT)
    assert GRAMMAR.is_well_formed(GRAMMAR.prefill + TEXT)
    assert GRAMMAR.is_well_formed(
        "\n" + TEXT.replace("</reaction>", "</reaction> so, \n") + "<|end|>"
    )
    assert GRAMMAR.extract_answer(TEXT) == "Yes"


@pytest.mark.parametrize(
    "broken",
    [
        "",
        TEXT.replace("</reaction>", ""),
        TEXT.replace("<reaction>", "<reaction><reaction>"),
        TEXT.replace("a threat", " \n"),
        TEXT.replace("<answer>Yes", "<answer> "),
        TEXT.replace("</think>", ""),
        TEXT.replace("</think>", "</think></think>"),
        TEXT.replace("<answer>Yes</answer>", "") + "<answer>Yes",
        TEXT.replace("lost", "<think>lost"),
        TEXT.replace("lost", "<stimulus>lost"),
        TEXT + "<answer>No</answer>",
        "<answer>Yes</answer>" + TEXT.removesuffix("<answer>Yes</answer>"),
        TEXT.replace("<reaction>", "<R>")
        .replace("<mental_state>", "<reaction>")
        .replace("<R>", "<mental_state>"),
        TEXT.replace("</think>", "").replace("<reaction>", "</think><reaction>"),
    ],
)
def test_malformed(broken):
    assert not GRAMMAR.is_well_formed(broken)


def test_extract_answer():
    assert (
        GRAMMAR.extract_answer("x<answer> Not sure \n</answer><answer>Yes</answer>") == "Not sure"
    )
    assert GRAMMAR.extract_answer("</answer><answer>No</answer>") == "No"
    assert GRAMMAR.extract_answer("x<answer>Yes") is None
    assert GRAMMAR.extract_answer("Yes") is None
    assert GRAMMAR.extract_answer("<answer></answer>") == ""


def test_without_stages():
    grammar = StageGrammar()
    assert (grammar.prefill, grammar.coefs(), grammar.names) == ("", [], [])
    assert grammar.stage_ids(b"<answer>Yes</answer>", ByteTokenizer()) == [-1] * 20
    assert grammar.render({}, "Yes") == "<answer>Yes</answer>"
    assert grammar.is_well_formed("so <answer>Yes</answer>")
    assert not grammar.is_well_formed("<answer>Yes</answer><answer>No</answer>")
    assert not grammar.is_well_formed("Yes")
    whole = StageGrammar(answer_tag="")
    assert whole.extract_answer(" Yes\n") == "Yes"
    assert whole.is_well_formed("Yes")
    assert not whole.is_well_formed(" ")
    assert whole.render({}, "Yes") == "Yes"
    assert whole.system_prompt() == ""


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    grammar = StageGrammar.preset(name)
    tags = {
        "mental_r1": "stimulus primary_appraisal secondary_appraisal reaction mental_state",
        "cognition_chain": "stimulus evaluation reaction mental_state",
        "lazarus_reappraisal": "stimulus primary_appraisal secondary_appraisal coping reappraisal "
        "mental_state",
        "scherer_cpm": "relevance implication coping_potential normative_significance mental_state",
        "cocot": "perception situation norm",
    }[name].split()
    assert grammar.names == [stage.tag for stage in grammar.stages] == tags
    prompt = grammar.system_prompt()
    positions = [prompt.index(f"{s.open}...{s.close} {s.instruction}") for s in grammar.stages]
    assert positions == sorted(positions)
    assert "<answer>" in prompt
    assert grammar.is_well_formed(grammar.render(dict.fromkeys(tags, "words"), "Yes"))
    assert sum(abs(beta) for beta in grammar.coefs()) > 0


# ---- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: StageGrammar.preset("mental_r2"),
            "preset: expected one of .*got 'mental_r2'.*mean 'mental_r1'",
        ),
        (lambda: StageGrammar.preset("cocot", magnitud=1), "got 'magnitud'.*mean 'magnitude'"),
        (
            lambda: StageGrammar(schedule="tan"),
            "schedule: expected one of .*got 'tan'.*mean 'tanh'",
        ),
        (lambda: StageGrammar(magnitude=math.nan), "magnitude: expected a finite number, got nan"),
        (
            lambda: StageGrammar((Stage("mental"), Stage("mental_state"))),
            "prefix.*'mental' and 'mental_state'.*Rename",
        ),
        (
            lambda: StageGrammar((Stage("mental_state"), Stage("mental"))),
            "prefix.*'mental' and 'mental_state'",
        ),
        (lambda: StageGrammar((Stage("answer_plan"),)), "prefix.*'answer' and 'answer_plan'"),
        (lambda: StageGrammar((Stage("a", "x"), Stage("b", "x"))), "different tags.*'x' twice"),
        (
            lambda: StageGrammar((Stage("a", "x"), Stage("a", "y"))),
            "different names, got 'a' twice",
        ),
        (lambda: StageGrammar((Stage("think"),)), "different tags.*'think' twice"),
        (lambda: StageGrammar((Stage("a"),), answer_tag="think"), "different tags.*'think' twice"),
        (lambda: StageGrammar((Stage("a b"),)), "letters, digits.*got 'a b'.*without its brackets"),
        (lambda: StageGrammar((Stage("<a>"),)), "got '<a>'.*without its brackets"),
        (lambda: StageGrammar((Stage(""),)), "got ''"),
        (lambda: StageGrammar((Stage("a"),), answer_tag=""), "answer_tag: expected a tag"),
        (
            lambda: StageGrammar((Stage("a", coef=1.0), Stage("b")), "explicit"),
            r"coef for every stage.*\['b'\]",
        ),
        (lambda: GRAMMAR.render({}, "Yes"), "text for every stage.*stimulus"),
        (lambda: GRAMMAR.render(CONTENTS, " "), r"\['answer'\]"),
        (lambda: GRAMMAR.render({"stimulu": "x"}, "Yes"), "got 'stimulu'.*mean 'stimulus'"),
        (
            lambda: GRAMMAR.render({**CONTENTS, "reaction": "</think>"}, "Yes"),
            "no tags inside 'reaction'",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
