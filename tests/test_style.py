"""Budgets of size, and words that do not belong into a public tree. Lists every offender."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("crpo_fast", "kernels", "benchmarks", "tests", "configs", "docs", ".ci")
TEXT = {
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".json",
    ".jsonl",
    ".csv",
    ".svg",
    ".yaml",
    ".yml",
    ".sh",
    "",
}
MAX_FILE, MAX_FUNCTION, MAX_KERNEL, MAX_FORWARD = 400, 60, 120, 8

MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|work|workspace|scratch|Users|mnt)/[\w.-]+")
REGISTRY = re.compile(r"pythonhosted\.org|download\.pytorch\.org|pypi\.org/simple|extra-index-url")


def text_files() -> Iterator[Path]:
    tops = [path for path in ROOT.iterdir() if path.is_file()]
    inner = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in sorted([*tops, *inner]):
        is_ours = path.name not in ("LICENSE", ".git")  # a file in another working tree of git
        if path.suffix in TEXT and "__pycache__" not in path.parts and is_ours:
            yield path


FILES = list(text_files())
PYTHON = [path for path in FILES if path.suffix == ".py"]


def label(path: Path, line: int = 0) -> str:
    return f"{path.relative_to(ROOT).as_posix()}{f':{line}' if line else ''}"


def functions(path: Path) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Every function of a file with what encloses it (bases of a class, decorators)."""
    for parent in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        bases = [ast.unparse(base) for base in getattr(parent, "bases", [])]
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                decorators = [ast.unparse(d) for d in node.decorator_list]
                yield node, " ".join([*bases, *decorators])


def test_files_are_at_most_400_lines():
    lines = {label(path): path.read_text(encoding="utf-8").count("\n") for path in PYTHON}
    assert {name: n for name, n in lines.items() if n > MAX_FILE} == {}


def test_functions_are_at_most_60_lines():
    offenders = {}
    for path in PYTHON:
        for node, context in functions(path):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > (MAX_KERNEL if "triton.jit" in context else MAX_FUNCTION):
                offenders[f"{label(path, node.lineno)} {node.name}"] = length
    assert offenders == {}


def test_autograd_functions_take_at_most_8_arguments():
    offenders = {}
    for path in PYTHON:
        for node, context in functions(path):
            if node.name == "forward" and re.search(r"\bFunction\b", context):
                count = (
                    len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) - 1
                )  # ctx
                if count > MAX_FORWARD or node.args.vararg:
                    offenders[label(path, node.lineno)] = count
    assert offenders == {}


def test_modules_say_what_they_are():
    trees = {label(path): ast.parse(path.read_text(encoding="utf-8")) for path in PYTHON}
    assert [name for name, tree in trees.items() if not ast.get_docstring(tree)] == []


def test_code_is_ascii():
    found = []
    for path in PYTHON:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [label(path, number)] if not line.isascii() else []
    assert found == []


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY], ids=["machine_path", "registry"])
def test_no_word_of_one_machine(pattern):
    found = []
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if path != Path(__file__) and pattern.search(line):
                found.append(f"{label(path, number)}: {line.strip()[:80]}")
    assert found == []


@pytest.mark.parametrize("text", ["cd /home/me/x", '"/Users/a"', "(/mnt/disk)"])
def test_machine_paths_are_recognised(text):
    assert MACHINE_PATH.search(text)
    relative = "runs/{}/x https://host/{}/x and ./{}/x".format("work", "home", "root")
    assert not MACHINE_PATH.search(relative)
