"""docs/api.md is what the code says; every public name says what it must; its examples run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re

import pytest

from crpo_fast import api_reference
from crpo_fast.api_reference import MODULES, Public, public_names, slug

PAGE = api_reference.PAGE.read_text("utf-8")
NAMES = {module: public_names(module) for module in MODULES}
ENTRIES = [entry for module in MODULES for name in NAMES[module] for entry in (name, *name.methods)]
IDS = [f"{entry.module}.{entry.name}" for entry in ENTRIES]
NEVER_RAISE = {  # on arguments of the right type
    *("unpatch", "TokenStats.sums", "StageGrammar.coefs", "StageGrammar.system_prompt"),
    *("StageGrammar.is_well_formed", "StageGrammar.extract_answer", "FusedLinearForPPO.forward"),
}
HAVE_SOURCES = {  # formulas of somebody's paper
    *("linear_logprobs", "linear_policy_loss", "ObjectiveSpec", "ObjectiveSpec.preset"),
    *("aggregation_weights", "stage_entropy_weights", "StageGrammar", "group_advantages"),
    "CRPOTrainer",
}
HAVE_EXAMPLES = {
    *("linear_logprobs", "linear_policy_loss", "ObjectiveSpec.preset", "aggregation_weights"),
    *("stage_entropy_weights", "explain_choice", "choose_backend", "unsupported_reason"),
    *("fused_linear_for_ppo", "add_fused_head", "StageGrammar.preset", "group_advantages"),
    *("head_options", "is_well_formed", "extract_answer"),
}
HAVE_UNITS = {  # of what they take or return
    "nats": {
        *("Logprobs", "TokenStats", "linear_logprobs", "linear_policy_loss", "CRPOTrainer"),
        *("fused_linear_for_ppo", "EntropyConfig"),
    },
    "tokens": {"aggregation_weights", "stage_entropy_weights", "explain_choice", "EntropyConfig"},
    "bytes": {"linear_logprobs", "linear_policy_loss"},
}
NEEDS = {"crpo_fast.integrations.trl": "trl", "crpo_kernels.integrations.verl_patch": "verl"}


def function_of(entry: Public) -> ast.FunctionDef | None:
    """What is called: the function, or the constructor of a class that writes one."""
    if isinstance(entry.node, ast.FunctionDef):
        return entry.node
    body = getattr(entry.node, "body", [])
    return next((n for n in body if getattr(n, "name", "") == "__init__"), None)


def explained(entry: Public) -> str:
    """All text about an entry: its own, its module's, and that of its signature's comments."""
    modules = {entry.module, *(m for key, ms in MODULES.items() for m in ms if entry in NAMES[key])}
    texts = [ast.get_docstring(api_reference._tree(m)) or "" for m in modules]
    return "\n".join([entry.docstring, entry.signature, *texts])


def is_property(entry: Public) -> bool:
    decorators = [ast.unparse(d) for d in getattr(entry.node, "decorator_list", [])]
    return bool({"property", "cached_property"} & set(decorators))


def test_the_page_is_current() -> None:
    assert api_reference.page() == PAGE, "run `python -m crpo_fast.api_reference`"


@pytest.mark.parametrize("module", [m for m in MODULES if m not in NEEDS])
def test_names_are_those_that_python_sees(module: str) -> None:
    loaded = importlib.import_module(module)
    names = [entry.name for entry in NAMES[module]]
    assert all(hasattr(loaded, name) for name in names)
    if hasattr(loaded, "__all__"):
        assert names == list(loaded.__all__)
    else:
        found = {n for n, x in vars(loaded).items() if getattr(x, "__module__", "") == module}
        assert set(names) >= {name for name in found if name[0] != "_"}


@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_every_name_is_on_the_page_and_described(entry: Public) -> None:
    assert re.search(rf"^###+ `{re.escape(entry.name)}`$", PAGE, re.MULTILINE)
    assert entry.signature in PAGE
    if isinstance(entry.node, ast.Assign):
        assert "#" in entry.signature, "say on its line what the constant is"
    else:
        assert len(entry.docstring) > 5 or is_property(entry)


@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_shapes_units_and_errors_are_said(entry: Public) -> None:
    function = function_of(entry)
    if function is None:
        fields = [n for n in getattr(entry.node, "body", []) if isinstance(n, ast.AnnAssign)]
        described = entry.docstring + "\n".join(re.findall(r"^.*#.*$", entry.signature, re.M))
        text = described if entry.name != "BackendChoice" else explained(entry)
        assert [f.target.id for f in fields if f.target.id not in text] == []
        assert not re.search(r": Tensor(?!.*\[)", entry.signature), "say the shape"
        return
    arguments = [*function.args.args, *function.args.kwonlyargs]
    text, lines = explained(entry), entry.signature.splitlines()
    for argument in (a for a in arguments if a.arg not in ("self", "cls")):
        line = next(s for s in lines if re.search(rf"\b{argument.arg}\b", s))
        is_said = "#" in line or re.search(rf"(?<![\w(]){argument.arg}\b[:`, ]", entry.docstring)
        at_all = re.search(rf"^\s*{argument.arg}  ", text, re.M) or f"``{argument.arg}" in text
        assert is_said or at_all, f"{argument.arg}: say what it is"
        if re.search(r"\bTensor\b", ast.unparse(argument.annotation or ast.Constant(""))):
            shape = rf"{argument.arg}\b[^\n]*\n?[^\n]*(\[|scalar|a number|one value)"
            assert re.search(shape, text), f"{argument.arg}: say its shape"
    raises = "Raises:" in entry.docstring or entry.name in NEVER_RAISE or is_property(entry)
    assert raises or inspect.isclass(entry.node), "say what it raises"
    if entry.name in HAVE_SOURCES:
        assert re.search(r"(arXiv )?\d{4}\.\d{5}", explained(entry)), "name the paper"


def test_units_are_named() -> None:
    by_name = {entry.name: entry for entry in ENTRIES}
    for unit, names in HAVE_UNITS.items():
        assert [name for name in names if unit not in explained(by_name[name])] == []


def modules_with_examples() -> set[str]:
    """Of both packages, public or not."""
    roots = (api_reference.REPOSITORY, api_reference.REPOSITORY / "kernels")
    found = [
        path.relative_to(root).with_suffix("")
        for root, name in zip(roots, ("crpo_fast", "crpo_kernels"), strict=True)
        for path in (root / name).rglob("*.py")
        if re.search(r"^ *>>> ", path.read_text("utf-8"), re.M)
    ]
    return {".".join(path.parts) for path in found}


def doctests(module: str) -> list[doctest.DocTest]:
    loaded = importlib.import_module(module)
    return [t for t in doctest.DocTestFinder().find(loaded, module) if t.examples]


def test_examples_in_docstrings_run() -> None:
    named = modules_with_examples()
    assert named >= {"crpo_kernels.api", "crpo_kernels.weights", "crpo_kernels.spec"}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner, source = doctest.DocTestRunner(optionflags=flags, verbose=False), ""
    for module in sorted(named):
        for test in doctests(module):
            source += "".join(example.source for example in test.examples)
            assert any(example.want for example in test.examples), f"{test.name} compares nothing"
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    missing = {n for n in HAVE_EXAMPLES if not re.search(rf"\b{n}\(", source)}
    assert missing == set()


def test_a_wrong_example_would_fail() -> None:
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    runner = doctest.DocTestRunner(verbose=False)
    assert runner.run(wrong, out=lambda text: None).failed == 1


def test_formulas_and_examples_are_blocks_of_their_own() -> None:
    text = "First.\n\n    a = b\n\n    >>> 1 + 1\n    2\n"
    expected = "First.\n\n```text\na = b\n```\n\n```pycon\n>>> 1 + 1\n2\n```\n\n"
    assert api_reference.markdown(text + "\nLast.") == expected + "Last.\n\n"
    assert api_reference.markdown("First.\n\n    >>> 1 + 1\n    2\n") == (
        "First.\n\n```pycon\n>>> 1 + 1\n2\n```\n\n"
    )


def test_docstrings_become_markdown() -> None:
    text = "First ``x``.\n\n    code  here\n\nArgs:\n    a: one\n        more\n    b: two\n\nLast."
    expected = (
        "First `x`.\n\n```text\ncode  here\n```\n\n**Args**\n\n- `a`: one\n  more\n- `b`: two\n\n"
    )
    assert api_reference.markdown(text) == expected + "Last.\n\n"


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("The loss alone", "the-loss-alone"),
        ("Number of ranks.", "number-of-ranks"),
        ("`linear_logprobs`", "linear_logprobs"),
        ("Loss numbers (CPU)", "loss-numbers-cpu"),
        ("6NVD, 8NVD", "6nvd-8nvd"),
        ("Mode A: one pass", "mode-a-one-pass"),
    ],
)
def test_anchors_are_those_of_github(heading: str, anchor: str) -> None:
    assert slug(heading, []) == anchor
    assert slug(heading, [anchor, "other", f"{anchor}-1"]) == f"{anchor}-2"
