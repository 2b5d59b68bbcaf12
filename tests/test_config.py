"""Reading the configuration: every refusal says what to type."""

from __future__ import annotations

from pathlib import Path

import pytest

from crpo_fast.config import (
    Config,
    ConfigError,
    check,
    load_config,
    parse_arguments,
    to_dict,
)

CONFIGS = Path(__file__).parent.parent / "configs"


def read(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "c.toml"
    file.write_text(text, encoding="utf-8")
    return load_config(file)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_configs_pass_every_check(path: Path) -> None:
    check(load_config(path))


def test_paper_config_has_the_papers_numbers() -> None:
    config = load_config(CONFIGS / "mental_r1_qwen3_8b.toml")
    assert (config.entropy.magnitude, config.entropy.tau) == (0.06, 3.5)
    assert (config.rollout.prompts_per_step, config.rollout.group_size) == (128, 4)
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.max_tokens) == (
        0.85,
        0.95,
        512,
    )
    assert (config.objective.kl_coef, config.optim.lr, config.objective.aggregation) == (
        0.01,
        5e-6,
        "bnpo",
    )
    assert [p.algorithm for p in config.phases] == ["crpo"]


def test_unknown_key_offers_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"c\.toml: unknown key rollout\.grup_size\. Did you mean rollout\.group_size\?",
    ):
        read(tmp_path, "[rollout]\ngrup_size = 4\n")


def test_unknown_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key rolout\. Did you mean rollout\?"):
        read(tmp_path, "[rolout]\ngroup_size = 4\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[rollout]\ngroup_size = 'four'\n",
            r"rollout\.group_size: expected int, got 'four' \(str\)",
        ),
        ("[optim]\nlr = true\n", r"optim\.lr: expected float, got True"),
        ("seed = 1.5\n", r"seed: expected int, got 1\.5"),
        ("rollout = 3\n", r"rollout: expected a table, got 3"),
        ("[rewards]\nfunctions = 'a:b'\n", r"rewards\.functions: expected a list, got 'a:b'"),
        ("[[phases]]\nsteps = 'x'\n", r"phases\[0\]\.steps: expected int, got 'x'"),
        ("[[stages]]\ntag = 'a'\n", r"stages\[0\]\.name is missing"),
        ("seed = \n", "not valid TOML"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"expected a TOML file, got 'nowhere\.toml'"):
        load_config("nowhere.toml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--rollout.group_size", "1"],
            r"rollout\.group_size: expected at least 2, got 1\..*type --rollout\.group_size",
        ),
        (
            ["--rollout.temperature", "0"],
            r"rollout\.temperature: expected a number above 0, got 0\.0\..*type --rollout\.temp",
        ),
        (
            ["--train.token_budget", "50"],
            r"train\.token_budget: expected at least one sequence.*Type --train\.token_budget",
        ),
        (
            ["--data.format", "official"],
            r"data\.root: expected a folder, got ''\. Type --data\.root",
        ),
        (["--data.format", "table"], r"data\.path: expected a JSONL or CSV file"),
        (["--phases.0.algorithm", "crpoo"], r"phases\[0\]\.algorithm.*Did you mean 'crpo'"),
        (
            ["--entropy.schedule", "tan"],
            r"entropy\.schedule: expected one of tanh.*Did you mean 'tanh'",
        ),
        (
            ["--rollout.top_p", "0.9", "--objective.rho_mode", "truncate"],
            r"untruncated sampling.*--rollout\.top_p 1",
        ),
        (["--train.max_steps", "-1"], r"train\.max_steps: expected 0"),
        (["--rewards.weights", "1"], r"rewards\.weights: expected 2 numbers"),
    ],
)
def test_cross_field_checks(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arguments(arguments)


def test_command_line_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("seed = 3\n[optim]\nlr = 1e-3\n[[phases]]\nalgorithm = 'grpo'\nsteps = 7\n")
    config = parse_arguments(
        [str(file), "--optim.lr", "5e-4", "--run.dir", "x", "--train.max_steps", "2"]
    )
    assert (config.seed, config.optim.lr, config.run.dir) == (3, 5e-4, "x")
    assert (config.phases[0].algorithm, config.phases[0].steps, config.train.max_steps) == (
        "grpo",
        7,
        2,
    )


def test_unknown_flag_exits_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse_arguments(["--rollout.grup_size", "4"])
    assert error.value.code == 2
    assert "--rollout.group" in capsys.readouterr().err


def test_dictionary_leaves_out_none() -> None:
    data = to_dict(Config())
    assert "tau" not in data["entropy"]
    assert data["phases"][0]["algorithm"] == "crpo"
