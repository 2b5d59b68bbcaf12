"""docs/config.md is what config.py says, and says something about every key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from crpo_fast import config, config_reference
from crpo_fast.config_checks import AGGREGATIONS, ALGORITHMS
from crpo_fast.config_ranges import RANGES
from crpo_fast.stage_presets import PRESETS
from crpo_fast.stages import SCHEDULES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")


def rows() -> dict[str, list[str]]:
    """section.key -> cells behind it."""
    found, section = {}, ""
    for line in PAGE.replace("\\|", "/").splitlines():
        if line.startswith("## "):
            section = line.strip("#` []") + "."
        elif line.startswith("| `"):
            key, *cells = (cell.strip(" `") for cell in line.strip("|").split("|"))
            found[section.replace("Top level.", "") + key] = cells
    return found


def test_the_page_is_current() -> None:
    assert config_reference.page() == PAGE, "run `python -m crpo_fast.config_reference`"


def test_every_key_is_described() -> None:
    described = rows()
    for name, cls in config_reference.sections():
        for field in dataclasses.fields(cls):
            path = ".".join(filter(None, [name.strip("[]"), field.name]))
            is_section = any(path == other.strip("[]") for other, _ in config_reference.sections())
            assert is_section or len(described[path][-1]) > 3, path
    assert len(described) > 100
    assert described["optim.lr"][:2] == ["float", "5e-06"]
    assert described["model.build.tie_embeddings"][:2] == ["bool", "true"]
    assert described["entropy.reference_length"][:2] == ["int / None", "None"]
    assert described["stages.name"][:2] == ["str", ""]
    ranged = {name for name, cells in described.items() if cells[2]}
    assert ranged == RANGES.keys()
    assert described["phases.steps"][2] == "a positive number"


def test_choices_are_named() -> None:
    for choice in (*PRESETS, *SCHEDULES, *ALGORITHMS, *AGGREGATIONS):
        assert choice in PAGE, choice


def test_a_comment_belongs_to_the_line_of_its_field() -> None:
    source = "class A:\n    x: int = 1  # one # two\n    y: str\n    z: tuple = (  # all\n    )\n"
    assert config_reference.comments(source) == {"A": {"x": "one # two", "y": "", "z": "all"}}


def test_flags_are_as_the_page_says() -> None:
    typed = (
        "--optim.lr 2e-6 --rollout.mask_truncated --entropy.no_alarm --phases.0.steps 20 "
        "--entropy.reference_length None --track.to tensorboard wandb"
    )
    found = config.parse_arguments(typed.split())
    assert found.optim.lr == 2e-6
    assert found.rollout.mask_truncated
    assert not found.entropy.alarm
    assert found.entropy.reference_length is None
    assert found.phases[0].steps == 20
    assert found.track.to == ("tensorboard", "wandb")


def test_help_shows_the_comments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        config.parse_arguments(["--help"])
    assert done.value.code == 0
    assert "share of the bound per unit" in " ".join(capsys.readouterr().out.split())
