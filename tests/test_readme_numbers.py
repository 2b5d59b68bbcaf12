"""The numbers in the README are those of the committed result files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import readme

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_what_the_files_say() -> None:
    assert readme.fill(TEXT) == TEXT, "run `python -m benchmarks readme`"


@pytest.mark.parametrize("name", readme.BLOCKS)
def test_every_block_is_there_once(name: str) -> None:
    assert len(re.findall(rf"<!-- {name} -->\n.+?<!-- /{name} -->", TEXT, re.DOTALL)) == 1


def test_a_changed_number_is_noticed() -> None:
    number = re.search(r"<!-- loss -->.*?(\d\.\d+)", TEXT, re.DOTALL)
    if number is None:
        pytest.skip("the loss is not measured yet")
    changed = TEXT[: number.start(1)] + "9.99" + TEXT[number.end(1) :]
    assert readme.fill(changed) == TEXT
