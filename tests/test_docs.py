"""The tables of docs/ and of the README against a run and against the tree."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from crpo_fast import train
from crpo_fast.api_reference import slug
from crpo_fast.controller import DualAscent, DualOptions

ROOT = Path(__file__).parent.parent
TINY = str(Path(__file__).with_name("tiny.toml"))
FLAGS = [
    *("--entropy.controller", "dual", "--objective.rho_mode", "mask"),
    *("--rollout.mask_truncated", "--rollout.dynamic_sampling", "--train.max_steps", "2"),
    *("--train.score_head", "fp8"),
]


def metric_rows() -> set[str]:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `([^`]+)` \|[^|]*\| [^|]{4,} \|$", text, re.MULTILINE)
    assert len(names) == len(set(names)) == len(re.findall(r"^\| `", text, re.MULTILINE))
    return set(names)


def row_of(key: str) -> str:
    """The row that a key belongs to."""
    name = re.sub(r"^(stage_\w+)/\d$", r"\1/k", key)
    return re.sub(r"/(format|answer)_reward$", "/<function>", name)


def test_every_metric_has_its_row_and_every_row_its_metric(tmp_path: Path) -> None:
    assert train.main([TINY, "--run.dir", str(tmp_path / "r"), *FLAGS]) == 0
    lines = (tmp_path / "r" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert {r["phase"] for r in records} == {"sft", "crpo"}
    keys = {key for record in records for key in record}
    dual = DualAscent(["a"], [0.0], DualOptions(bound=0.1))  # the tiny model writes no stages
    keys |= dual.update([1.0]).keys()
    assert {row_of(key) for key in keys} == metric_rows()


def test_the_file_map_has_every_module_and_no_other() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)`", text[text.index("## File map") : text.index("## Limits")])
    trainer = ("crpo_fast", "crpo_fast/report", "crpo_fast/rollout", "crpo_fast/integrations")
    kernels = ("kernels/crpo_kernels", "kernels/crpo_kernels/integrations")
    modules = [p.stem for folder in (*trainer, *kernels) for p in (ROOT / folder).glob("[!_]*.py")]
    modules += [p.stem for p in (ROOT / "benchmarks").rglob("[!_]*.py")]
    assert sorted(named) == sorted(modules)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> list[str]:
    """Of every heading, as GitHub makes them."""
    found: list[str] = []
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, re.MULTILINE):
        found.append(slug(heading, found))
    return found


def dead_links(page: Path) -> list[str]:
    """Links of a page to files or headings that are not there."""
    dead = []
    text = re.sub(r"`[^`\n]*`", "code", FENCED.sub("", page.read_text(encoding="utf-8")))
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_pages_exist(page: Path) -> None:
    assert dead_links(page) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One\n## One\n```\n# no heading\n```\n", "utf-8")
    good = "[a](other.md) [b](other.md#one-1) [`c`](#here) [d](https://x/y) `[e](code)`"
    page = tmp_path / "page.md"
    page.write_text(f"# Here\n{good} [f](gone.md) [g](other.md#no-heading) [h](#two)\n", "utf-8")
    assert dead_links(page) == ["gone.md", "other.md#no-heading", "#two"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_the_pages_compiles(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.DOTALL):
        is_header = re.search(r":( +#.*)?\n$", block)  # a signature, without its body
        compile(block + " " * 12 + "...\n" if is_header else block, page.name, "exec")
