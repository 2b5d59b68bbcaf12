"""docs/api.md from signatures and docstrings: `python -m crpo_fast.api_reference` writes it.

Source text alone is read and nothing imported: the page is the same without TRL or verl. A module's
public names are its ``__all__``, or else everything defined in it whose name has no leading "_". A
name that it took from another module of ours is shown as that module defines it.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from crpo_fast.config import REPOSITORY

PAGE = REPOSITORY / "docs" / "api.md"
MODULES: dict[str, tuple[str, ...]] = {  # to import from -> whose text explains its names, too
    "crpo_kernels": ("crpo_kernels.api", "crpo_kernels.weights", "crpo_kernels.explain"),
    "crpo_kernels.integrations.verl": (),
    "crpo_kernels.integrations.verl_patch": (),
    "crpo_fast.integrations.causal_lm": (),
    "crpo_fast.integrations.trl": (),
    "crpo_fast.model_check": (),
    "crpo_fast.stages": (),
    "crpo_fast.advantages": (),
}
_HEAD = """# Every public name

Written by `python -m crpo_fast.api_reference` from signatures and docstrings. Names that are not
here are internal and may change. Letters: T packed tokens (rows), V vocabulary, D hidden size, B
sequences, S or K stages, r rank of an adapter. Logarithms are natural, so that log-probabilities
and entropies are in nats; lengths are in tokens, workspaces in bytes. Arguments are never changed
in place. How it works: [kernels.md](kernels.md). In other trainers:
[integrations.md](integrations.md).
"""
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Source|Example):$")
_ENTRY = re.compile(r"(\*{0,2}[A-Za-z_][\w, *]*): +(.*)")
_COMMENT_OF_TOOLS = re.compile(r"  # (noqa|type: ignore).*$")

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


class Public(NamedTuple):
    """A public name and where it is defined."""

    name: str
    module: str
    node: Definition

    @property
    def docstring(self) -> str:
        """Cleaned; empty where there is none, as for a constant."""
        if not isinstance(self.node, ast.FunctionDef | ast.ClassDef):
            return ""
        return ast.get_docstring(self.node) or ""

    @property
    def signature(self) -> str:
        """As in the source, with the comments that say shapes."""
        lines, node = source(self.module), self.node
        if isinstance(node, ast.FunctionDef):
            return _header(node, lines)
        if isinstance(node, ast.ClassDef):
            inner = [_line_of(n, lines) for n in node.body if isinstance(n, ast.AnnAssign)]
            made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
            inner += [textwrap.indent(_header(n, lines), "    ") for n in made]
            return "\n".join([_header(node, lines), *inner])
        return _line_of(node, lines)

    @property
    def methods(self) -> list[Public]:
        """Public ones of a class."""
        body = self.node.body if isinstance(self.node, ast.ClassDef) else []
        found = [n for n in body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"]
        return [Public(f"{self.name}.{n.name}", self.module, n) for n in found]


def path_of(module: str) -> Path:
    """The file of a module of ours."""
    root = REPOSITORY / ("kernels" if module.startswith("crpo_kernels") else "")
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def source(module: str) -> tuple[str, ...]:
    """Lines of the module's file."""
    return tuple(path_of(module).read_text(encoding="utf-8").splitlines())


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse("\n".join(source(module)))


def public_names(module: str) -> list[Public]:
    """Of one module, in the order of the source, or of ``__all__``."""
    listed = [n for n in _tree(module).body if _names(n) == ["__all__"]]
    if listed:
        names = ast.literal_eval(listed[0].value)  # type: ignore[attr-defined]
    else:
        names = [name for node in _tree(module).body for name in _names(node) if name[0] != "_"]
    return [_definition(module, name) for name in names if name not in ("logger",)]


def _names(node: ast.stmt) -> list[str]:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _definition(module: str, name: str) -> Public:
    for node in _tree(module).body:
        if name in _names(node):
            assert isinstance(node, Definition)
            return Public(name, module, node)
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            package = module if path_of(module).name == "__init__.py" else module.rpartition(".")[0]
            return _definition(
                f"{package}.{node.module}" if node.level else node.module or "", name
            )
    raise LookupError(f"{name}: expected a definition or an import in {module}. Correct __all__.")


def _header(node: ast.FunctionDef | ast.ClassDef, lines: tuple[str, ...]) -> str:
    """From the first decorator to the colon."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    text = textwrap.dedent("\n".join(lines[first - 1 : max(node.body[0].lineno - 1, node.lineno)]))
    return "\n".join(_COMMENT_OF_TOOLS.sub("", line) for line in text.rstrip().splitlines())


def _line_of(node: Definition, lines: tuple[str, ...]) -> str:
    return "\n".join(lines[node.lineno - 1 : node.end_lineno])


def slug(heading: str, taken: list[str]) -> str:
    """The anchor that GitHub gives to a heading that follows those with the anchors ``taken``."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
    again = [old for old in taken if re.fullmatch(rf"{re.escape(name)}(-\d+)?", old)]
    return f"{name}-{len(again)}" if again else name


def page() -> str:
    """docs/api.md."""
    contents, parts, taken = [], [], [slug(_HEAD.splitlines()[0].strip("# "), [])]
    for module, explained in MODULES.items():
        taken.append(slug(module, taken))
        names = []
        doc = "\n\n".join(ast.get_docstring(_tree(m)) or "" for m in (module, *explained))
        parts.append(f"## `{module}`\n\n{_source_link(module)}{markdown(doc)}")
        for entry in public_names(module):
            taken.append(slug(entry.name, taken))
            names.append(f"[`{entry.name}`](#{taken[-1]})")
            parts.append(_section(entry, taken))
        contents.append(f"- `{module}`: {', '.join(names) or 'importing it is all'}\n")
    return "\n".join([_HEAD, "".join(contents), *parts])


def _section(entry: Public, taken: list[str]) -> str:
    text = f"### `{entry.name}`\n\n```python\n{entry.signature}\n```\n{_source_link(entry.module)}"
    text += markdown(entry.docstring)
    for method in entry.methods:
        taken.append(slug(method.name, taken))
        text += f"\n#### `{method.name}`\n\n```python\n{method.signature}\n```\n"
        text += markdown(method.docstring)
    return text


def _source_link(module: str) -> str:
    path = path_of(module).relative_to(REPOSITORY).as_posix()
    return f"Defined in [{path}](../{path}).\n\n"


def markdown(docstring: str) -> str:
    """A docstring as Markdown: sections as lists, indented lines and examples as code."""
    parts = []
    for is_indented, lines in _blocks(inspect.cleandoc(docstring).splitlines()):
        text = textwrap.dedent("\n".join(lines)).strip("\n")
        head = _SECTION.fullmatch(parts[-1]) if parts else None
        if head and is_indented:
            parts[-1] = f"**{head[1]}**\n\n{_fenced(text) if _is_example(text) else _entries(text)}"
        elif text:
            parts.append(_fenced(text) if is_indented or _is_example(text) else _prose(text))
    return "".join(f"{part}\n\n" for part in parts)


def _blocks(lines: list[str]) -> Iterator[tuple[bool, list[str]]]:
    """Runs of indented lines, and paragraphs between them; a section's head stands alone."""
    block: list[str] = []
    is_indented = False
    for line in lines:
        is_new = line != "" and (
            line.startswith(" ") != is_indented
            or (
                not is_indented and (not block or block[-1] == "" or bool(_SECTION.fullmatch(line)))
            )
        )
        if is_new and block:
            yield is_indented, block
            block = []
        if line:
            is_indented = line.startswith(" ")
        block.append(line)
    if block:
        yield is_indented, block


def _is_example(text: str) -> bool:
    return text.startswith(">>> ")


def _fenced(text: str) -> str:
    """Formulas and examples in blocks of their own."""
    formulas, mark, examples = text.partition(">>> ")
    kinds = {"text": formulas.strip("\n"), "pycon": mark + examples}
    return "\n\n".join(f"```{kind}\n{part}\n```" for kind, part in kinds.items() if part)


def _entries(text: str) -> str:
    if not all(_ENTRY.match(line) or line.startswith(" ") for line in text.splitlines()):
        return _prose(text)
    found = [_ENTRY.match(line) for line in text.splitlines()]
    lines = zip(found, text.splitlines(), strict=True)
    return _prose("\n".join(f"- `{m[1]}`: {m[2]}" if m else f"  {s.strip()}" for m, s in lines))


def _prose(text: str) -> str:
    return text.replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
