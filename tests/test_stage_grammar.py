"""Stages: grammar, schedule, format, refusals."""

import math

import pytest

from crpo_fast.stage_presets import PRESETS
from crpo_fast.stages import Stage, StageGrammar
from stage_tokenizers import (
    CONTENTS,
    GRAMMAR,
    TEXT,
    ByteTokenizer,
    byte_level,
)


@pytest.fixture(scope="module")
def plain():
    return byte_level()


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
