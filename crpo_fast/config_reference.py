"""docs/config.md from config.py: `python -m crpo_fast.config_reference` writes it.

A section's text is the docstring of its dataclass; a key's is the comment on its line, which --help
shows, too; its range is that of config_ranges.py.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import tokenize
import typing
from pathlib import Path
from typing import Any

from crpo_fast import config
from crpo_fast.config_ranges import RANGES

PAGE = config.REPOSITORY / "docs" / "config.md"
_HEAD = """# Every key of the configuration

Written by `python -m crpo_fast.config_reference` from `crpo_fast/config.py`. The default is that of
a key that the file leaves out; a key without one has to be given. TOML has no null: to say `None`,
leave the key out.

Every key that the file or its defaults have is a flag: `--optim.lr 2e-6`; a switch is
`--rollout.mask_truncated` or `--entropy.no_alarm`, a list `--track.to tensorboard wandb`, a phase
of the file `--phases.0.steps 20`, and `None` is typed where the type allows it. `[[stages]]` and
further `[[phases]]` stand in the file.
"""
_TABLE = "| key | type | default | range | |\n| --- | --- | --- | --- | --- |\n"


def comments(source: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the comment on the field's line, of all classes in ``source``."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {
        t.start[0]: t.string.lstrip("# ").rstrip() for t in tokens if t.type == tokenize.COMMENT
    }
    return {
        node.name: {
            field.target.id: by_line.get(field.lineno, "")
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def sections(cls: Any = config.Config, name: str = "") -> list[tuple[str, Any]]:
    """(dotted name, dataclass) of ``cls`` and of every section below it, in order."""
    found, hints = [(name, cls)], typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner, is_list = _section(hints[field.name])
        if inner is not None:
            path = f"{name}.{field.name}" if name else field.name
            found += sections(inner, f"[{path}]" if is_list else path)
    return found


def page() -> str:
    """docs/config.md."""
    texts = comments(Path(config.__file__).read_text(encoding="utf-8"))
    parts = [_HEAD]
    for name, cls in sections():
        heading = f"`[{name}]`" if name else "Top level"
        intro = "" if cls is config.Config else f"{_intro(cls)}\n\n"
        rows = "".join(_rows(cls, name.strip("[]"), texts[cls.__name__]))
        parts.append(f"## {heading}\n{intro}{_TABLE}{rows}")
    return "\n".join(parts)


def _intro(cls: Any) -> str:
    lines = [line.strip() for line in cls.__doc__.strip().splitlines()]
    return "\n".join(lines).replace("``", "`")


def _rows(cls: Any, section: str, texts: dict[str, str]) -> list[str]:
    hints, rows = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        if _section(hints[field.name])[0] is None:
            kind = field.type if isinstance(field.type, str) else str(field.type)
            name = f"{section}.{field.name}" if section else field.name
            allowed = RANGES[name].words if name in RANGES else ""
            cells = (f"`{field.name}`", f"`{kind}`", _default(field), allowed, texts[field.name])
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return rows


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return ""
    if field.default is None:
        return "`None`"
    return f"`{json.dumps(field.default)}`"


def _section(hint: Any) -> tuple[Any, bool]:
    """(the dataclass of a section, whether it is a list of tables); (None, False) for a key."""
    arguments = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return hint, False
    if arguments and dataclasses.is_dataclass(arguments[0]):
        return arguments[0], True
    return None, False


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
