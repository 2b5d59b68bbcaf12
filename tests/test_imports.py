"""Who may import whom; imports under `if TYPE_CHECKING` do not count."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    "crpo_fast": ROOT / "crpo_fast",
    "crpo_kernels": ROOT / "kernels" / "crpo_kernels",
    "benchmarks": ROOT / "benchmarks",
}
RECORDS = {"crpo_fast.batch"}
# module (and modules that begin with it and "_") -> all that it may import of ours
MAY_IMPORT = {
    "crpo_fast.batch": set(),
    "crpo_fast.advantages": RECORDS,
    "crpo_fast.stages": RECORDS | {"crpo_fast.stage_presets", "crpo_fast.token_text"},
    "crpo_fast.stage_presets": set(),
    "crpo_fast.token_text": set(),
    "crpo_fast.packing": RECORDS,
    "crpo_fast.rewards": RECORDS | {"crpo_fast.reward_calls"},
    "crpo_fast.reward_calls": RECORDS,
    "crpo_fast.reward_worker": {"crpo_fast.reward_calls"},  # starts in .1 s: no torch
    "crpo_fast.scoring": RECORDS,
    "crpo_fast.plots": set(),
    "crpo_kernels.objective": set(),
    "crpo_kernels.spec": set(),
    "crpo_kernels.objective_triton": {
        *("crpo_kernels.launch_triton", "crpo_kernels.twin_triton", "crpo_kernels.row_table"),
    },
    "crpo_kernels.weights": {
        *("crpo_kernels.stage_triton", "crpo_kernels.support", "crpo_kernels.host"),
        "crpo_kernels.spec",
    },
    "crpo_kernels.reference": {"crpo_kernels.objective", "crpo_kernels.spec"},
}
# All may use these: a sharded tensor is a tensor, a checkpoint is a file.
SHARED = ("torch.distributed.tensor", "torch.distributed.checkpoint")
PURE = ("advantages", "stages", "packing", "rewards", "data", "synthetic", "prompts", "scoring")
LAYERS = (  # of crpo_kernels, every module; one imports from later rows only
    {"integrations.verl_patch", "integrations"},
    {"integrations.verl"},
    {"api", "explain"},
    {"traced"},
    {"operators"},
    {"call"},
    {"autograd"},
    {"chunked", "dispatch"},
    {"scorer"},
    {"aligned"},
    {"rows_compiled", "work_triton"},
    {"vocab_parallel"},
    {"rows_torch", "exps_triton", "linear_triton"},
    {"rows_triton", "linear_tiles"},
    {"logits_triton", "objective_triton"},
    {"row_table"},
    {"rows"},
    {"terms", "quantised", "lora"},
    {"compilation", "plan", "products", "reference", "validate", "weights", "factors"},
    {"stage_triton", "support", "twin_triton"},
    {"launch_triton"},
    {"host"},
    {"objective", "spec", "score_table"},
)


def runtime_nodes(node: ast.AST, late: bool) -> Iterator[ast.AST]:
    """Walks what runs: not what only a type checker sees, and functions only if ``late``."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not late:
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from runtime_nodes(child, late)


def imports_of(source: str, name: str, is_package: bool = False, late: bool = True) -> set[str]:
    """Dotted names that the module ``name`` imports: ``from a import b`` gives ``a`` and ``a.b``.

    ``late`` counts what is imported inside functions, when they run.
    """
    found: set[str] = set()
    for node in runtime_nodes(ast.parse(source), late):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if is_package else name.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            found.add("torch.distributed")
    return found


def load_modules(late: bool = True) -> dict[str, set[str]]:
    """Module name -> what it imports, for every file of ours outside the tests."""
    modules = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            modules[name] = imports_of(path.read_text("utf-8"), name, is_package, late)
    return modules


MODULES = load_modules()


def ours(name: str) -> set[str]:
    """Modules of ours that ``name`` imports, without the package that holds it."""
    return {m for m in MODULES[name] if m in MODULES and m != name.split(".")[0]}


def family(name: str) -> str:
    """``crpo_fast.data_tables`` -> ``crpo_fast.data``: pieces of a module keep its rules."""
    package, _, module = name.partition(".")
    return f"{package}.{module.split('_')[0]}"


def starts_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def test_the_parser_sees_every_kind_of_import():
    source = (
        "from __future__ import annotations\nimport a.b as c\nfrom . import d\nfrom .e import f\n"
        "from ..g import h\nif TYPE_CHECKING:\n    import hidden\ndef late():\n    import i\n"
        "torch.distributed.barrier()\n"
    )
    expected = {"__future__", "__future__.annotations", "a.b", "p.q", "p.q.d", "p.q.e", "p.q.e.f"}
    expected |= {"p.g", "p.g.h", "i", "torch.distributed"}
    assert imports_of(source, "p.q.m") == expected
    assert imports_of(source, "p.q.m", late=False) == expected - {"i"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_imports_only_what_its_layer_allows(name):
    rule = MAY_IMPORT.get(name, MAY_IMPORT.get(family(name)))
    if rule is not None:
        pieces = {m for m in ours(name) if family(m) == family(name)}
        assert ours(name) - pieces <= rule
    package, _, module = name.partition(".")
    layer = next((i for i, row in enumerate(LAYERS) if module in row), None)
    if layer is not None and package == "crpo_kernels":
        above = {f"crpo_kernels.{m}" for row in LAYERS[: layer + 1] for m in row}
        assert not ours(name) & above


def test_every_module_of_the_kernels_has_a_layer():
    named = [f"crpo_kernels.{module}" for row in LAYERS for module in row]
    assert sorted(named) == sorted(m for m in MODULES if m.startswith("crpo_kernels."))


@pytest.mark.parametrize("name", [m for m in sorted(MODULES) if m.startswith("crpo_kernels")])
def test_kernels_need_torch_alone(name):
    third_party = {m.split(".")[0] for m in MODULES[name]} - sys.stdlib_module_names
    allowed = {"torch", "crpo_kernels"} | ({"triton"} if name.endswith("_triton") else set())
    if not name.startswith("crpo_kernels.integrations"):
        assert third_party <= allowed


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nobody_reaches_up(name):
    forbidden = ["tests", "crpo_fast.train"]
    if not name.startswith("benchmarks"):
        forbidden.append("benchmarks")
    if name.startswith("crpo_fast") and not starts_with(name, "crpo_fast.distributed"):
        forbidden.append("torch.distributed")
    if family(name).removeprefix("crpo_fast.") in PURE:
        forbidden += [*SHARED, "transformers", "crpo_fast.config"]
    if not name.endswith("_triton"):
        forbidden.append("triton")
    found = {m for m in MODULES[name] for prefix in forbidden if starts_with(m, prefix)}
    if not set(SHARED) & set(forbidden):
        found -= {m for m in found for prefix in SHARED if starts_with(m, prefix)}
    assert not found


def test_the_trainer_uses_public_names_of_the_kernels_only():
    inner = {m for m in MODULES if m.startswith("crpo_kernels.")}
    users = {name: sorted(ours(name) & inner) for name in MODULES if name.startswith("crpo_fast")}
    assert {name: found for name, found in users.items() if found} == {}


def test_no_import_cycles():
    modules = load_modules(late=False)
    TopologicalSorter({name: modules[name] & set(modules) - {name} for name in modules}).prepare()
