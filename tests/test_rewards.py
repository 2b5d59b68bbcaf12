"""Format and answer rewards, balance weights, and how reward functions are called."""

import asyncio
import functools
import math
import sys

import pytest

from crpo_fast.batch import Row
from crpo_fast.rewards import (
    RewardError,
    answer_reward,
    balance_weights,
    format_reward,
    load_reward,
    score,
)
from crpo_fast.stages import Stage, StageGrammar

GRAMMAR = StageGrammar.preset("mental_r1")
GOOD = GRAMMAR.render(dict.fromkeys(GRAMMAR.names, "words"), "Yes")


def tagged(answer):
    return f"words</stimulus></think><answer>{answer}</answer>"


def test_format_reward():
    chat = [{"role": "assistant", "content": GOOD}]
    broken = GOOD.replace("</reaction>", "")
    values = format_reward([GOOD, broken, chat, "", "<think>\n<stimulus>" + GOOD], grammar=GRAMMAR)
    assert values == [0.5, -0.5, 0.5, -0.5, 0.5]
    assert format_reward(completions=[GOOD], prompts=["p"], answer=["x"], grammar=GRAMMAR) == [0.5]


@pytest.mark.parametrize(
    ("given", "label", "prefix", "exact"),
    [
        ("Yes", "Yes", True, True),
        ("  yes \n", "Yes", True, True),
        ("Yes, the writer is", "Yes", True, False),
        ("Yes.", "Yes", True, False),
        ("Yesterday", "Yes", False, False),
        ("The answer is Yes", "Yes", False, False),
        ("Not sure", "No", False, False),
        ("Not depressed", "No", False, False),
        ("not depressed.", "Not depressed", True, False),
        ("No", "Not depressed", False, False),
        ("[1-2]", "[1-2]", True, True),
        ("[1-2] because", "[1-2]", True, False),
        ("1", "[1-2]", False, False),
        ("-", "[1-2]", False, False),
        ("No_", "No", False, False),
        ("", "No", False, False),
    ],
)
def test_answer_matching(given, label, prefix, exact):
    for match, correct in (("prefix", prefix), ("exact", exact)):
        for grammar in (None, GRAMMAR):
            values = answer_reward([tagged(given)], answer=[label], grammar=grammar, match=match)
            assert values == [1.0 if correct else -1.0]


def test_answer_reward_is_weighted_by_the_gold_label():
    weights = {("A", "Yes"): 0.25, ("A", "No"): 2.0, ("B", "Yes"): 3.0}
    values = answer_reward(
        [tagged("Yes"), tagged("Yes"), "no tags", tagged("Yes"), tagged("No")],
        answer=["Yes", "No", "Yes", "Yes", "Maybe"],
        dataset_id=["A", "A", "B", "B", "B"],
        balance_weights=weights,
        prompts=["p"] * 5,
        stage=["ignored"] * 5,
    )
    assert values == [0.25, -2.0, -3.0, 3.0, -1.0]
    assert answer_reward([tagged("No")], answer=["Yes"], balance_weights=weights) == [-1.0]


def test_missing_answer():
    unclosed = "x<answer>Yes"
    assert answer_reward(["Yes", unclosed, ""], answer=["Yes"] * 3, grammar=GRAMMAR) == [-1.0] * 3
    assert answer_reward(["Yes"], answer=["Yes"], grammar=StageGrammar()) == [-1.0]
    whole = StageGrammar(answer_tag="")
    assert answer_reward(["Yes", "x Yes"], answer=["Yes"] * 2, grammar=whole) == [1.0, -1.0]
    found = answer_reward([tagged(" Yes "), "Yes", unclosed], answer=["Yes"] * 3)
    assert found == [1.0, -1.0, -1.0]
    own = StageGrammar((Stage("plan"),), answer_tag="final")
    assert answer_reward(["<final>Yes</final>"], answer=["Yes"], grammar=own) == [1.0]


def test_conversational_completions():
    chat = [{"role": "assistant", "content": tagged("Yes")}]
    assert answer_reward([chat], answer=["Yes"]) == [1.0]
    with pytest.raises(ValueError, match="expected text or a list of messages, got int"):
        answer_reward([3], answer=["Yes"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"answer": ["Yes"]}, "answer: expected a list with one entry per completion, 2, got 1"),
        ({"answer": "No"}, "answer: expected a list.*got 'No'"),
        ({"answer": ["a", "b"], "dataset_id": ["A"] * 3}, "dataset_id: expected.*2, got 3"),
        ({"answer": ["a", " "]}, "answer: expected a label, got ' '"),
        ({"answer": ["a", "b"], "match": "fuzzy"}, "match: expected 'prefix' or 'exact'"),
    ],
)
def test_answer_reward_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        answer_reward([tagged("x"), tagged("y")], **kwargs)


def test_balance_weights_by_hand():
    """A: 3 Yes, 1 No; B: 2 c.  w_A = (1/4) / mean(1/4, 1/2) = 2/3, w_B = 4/3; in A w = 1/2, 3/2."""
    pairs = [("A", "Yes")] * 3 + [("A", "No")] + [("B", "c")] * 2
    expected = {
        ("A", "Yes"): math.sqrt(0.5 * 2 / 3),
        ("A", "No"): math.sqrt(1.5 * 2 / 3),
        ("B", "c"): math.sqrt(4 / 3),
    }
    assert balance_weights(pairs) == pytest.approx(expected, abs=1e-15)
    rows = [Row("text", label, dataset_id=name) for name, label in pairs]
    assert balance_weights(rows) == balance_weights(pairs)
    assert balance_weights([("A", "x"), ("A", "y")]) == {("A", "x"): 1.0, ("A", "y"): 1.0}
    assert balance_weights([]) == {}


# ---- calling


def short(completions, **columns):
    return [float(len(c) < 3) for c in completions]


def only_yes(completions, answer):
    return [None if label != "Yes" else 1.0 for label in answer]


async def slow_length(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]


def test_score_adds_up_what_applies():
    table = score(
        [short, only_yes, slow_length],
        [1.0, 10.0, 0.5],
        ["p", "pp"],
        ["ab", "abc"],
        {"answer": ["Yes", "No"]},
        grammar=GRAMMAR,
    )
    assert table.total == [1 + 10 + 1.5, 0 + 2.5]
    assert table.parts == {
        "short": [1.0, 0.0],
        "only_yes": [1.0, None],
        "slow_length": [3.0, 5.0],
    }
    assert table.errors == ()


def test_score_with_the_built_in_functions():
    table = score(
        [
            load_reward("crpo_fast.rewards:format_reward"),
            load_reward("crpo_fast.rewards:answer_reward"),
        ],
        [1.0, 1.0],
        ["p"] * 2,
        [GOOD, tagged("No")],
        {"answer": ["Yes", "Yes"], "dataset_id": ["A", "A"], "age": ["1", "2"]},
        grammar=GRAMMAR,
        match="prefix",
        balance_weights={("A", "Yes"): 0.3},
    )
    assert table.total == pytest.approx([0.8, -0.8])


def test_async_functions_run_together_and_inside_a_running_loop():
    gate = {}

    async def first(completions):
        gate["event"] = asyncio.Event()
        await asyncio.wait_for(gate["event"].wait(), 5)
        return [1.0]

    async def second(completions):
        await asyncio.sleep(0)
        gate["event"].set()
        return [2.0]

    async def inside():
        return score([first, second], [1, 1], ["p"], ["c"], {})

    assert score([first, second], [1, 1], ["p"], ["c"], {}).total == [3.0]
    assert asyncio.run(inside()).total == [3.0]


def test_nan_is_counted_and_none_is_not():
    def broken(completions):
        return [math.nan, 1.0, None, math.inf]

    table = score([broken, short], [1.0, 1.0], [""] * 4, ["ab"] * 4, {})
    assert [e.sample for e in table.errors] == [0, 3]
    assert table.parts["broken"] == [None, 1.0, None, None]
    assert [math.isnan(t) for t in table.total] == [True, False, False, True]
    assert table.total[1:3] == [2.0, 1.0]
    nothing = score([only_yes], [1.0], ["p"], ["c"], {"answer": ["No"]})
    assert math.isnan(nothing.total[0])
    assert nothing.errors == ()


def test_two_functions_of_one_name():
    prefix = functools.partial(answer_reward, match="prefix")
    exact = functools.partial(answer_reward, match="exact")
    table = score([prefix, exact], [1, 1], ["p"], [tagged("Yes.")], {"answer": ["Yes"]})
    assert table.parts == {"answer_reward": [1.0], "answer_reward_2": [-1.0]}
    named = score({"loose": prefix}, [2], ["p"], [tagged("Yes.")], {"answer": ["Yes"]})
    assert named.parts == {"loose": [1.0]}
    assert named.total == [2.0]


def raises_on_b(completions, **columns):
    return [1 / (c != "b") for c in completions]


async def raises_later(completions, **columns):
    await asyncio.sleep(0)
    return raises_on_b(completions)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises_on_b, r"reward raises_on_b: .*ZeroDivisionError.*sample 1, a completion of 1 char"),
        (
            raises_later,
            r"reward raises_later: .*ZeroDivisionError.*sample 1, a completion of 1 char",
        ),
        (
            lambda completions: [1.0],
            "expected 2 values, got 1; they part at sample 1, a completion of 1 char",
        ),
        (lambda completions: [1.0] * 3, "expected 2 values, got 3"),
        (
            lambda completions: [1.0, "x"],
            "expected a number or None, got str; sample 1, a completion of 1 char",
        ),
        (lambda completions: 1.0, "expected a list of numbers, got float"),
        (lambda completions, missing: [1.0] * 2, "missing.*keywords prompts, completions, answer"),
    ],
)
def test_a_bad_function_is_named_with_a_sample(function, message):
    with pytest.raises(RewardError, match=message):
        score([function], [1.0], ["p", "q"], ["a", "b"], {"answer": ["x", "y"]})


def test_score_refusals():
    with pytest.raises(ValueError, match="weights: expected one per function, 1, got 2"):
        score([short], [1, 1], ["p"], ["c"], {})
    with pytest.raises(ValueError, match="answer: expected one entry per completion, 1, got 2"):
        score([short], [1], ["p"], ["c"], {"answer": ["x", "y"]})
    with pytest.raises(ValueError, match=r"got \['grammar'\].*Rename the column"):
        score([short], [1], ["p"], ["c"], {"grammar": ["x"]}, grammar=GRAMMAR)


def test_load_reward(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_test.py").write_text(
        "limit = 3\ndef is_short(completions): return [1.0]\n"
    )
    (tmp_path / "broken_rewards_of_test.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_reward("my_rewards_of_test:is_short")([""]) == [1.0]
    for path, message in {
        "is_short": "'module:function', got 'is_short'",
        "my_rewards_of_test:": "'module:function'",
        "no_such_module_at_all:f": "importable module.*no_such_module_at_all.*PYTHONPATH",
        "broken_rewards_of_test:f": "importable module.*nowhere_to_be_found",
        "my_rewards_of_test:is_shor": "'is_shor' in my_rewards_of_test, got none.*is_short",
        "my_rewards_of_test:limit": "got 3",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_reward(path)
    sys.modules.pop("my_rewards_of_test")
