"""Reading the configuration: every refusal says what to type."""

from __future__ import annotations

from pathlib import Path

import pytest

from crpo_fast import train
from crpo_fast.config import (
    Config,
    ConfigError,
    check,
    load_config,
    parse_arguments,
    to_dict,
)
from crpo_fast.config_checks import LOSS_BACKENDS
from crpo_fast.config_ranges import RANGES
from crpo_kernels import dispatch

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
        (
            ["--train.loss_backend", "foo"],
            r"train\.loss_backend: expected one of auto, triton, torch, dense, got 'foo'",
        ),
        (["--phases.0.schedule", "cosin"], r"phases\[0\]\.schedule: .*Did you mean 'cosine'"),
        (
            ["--eval.batch", "0"],
            r"eval\.batch: expected a positive number, got 0\. Type --eval\.batch 64\.",
        ),
        (["--rollout.top_k", "-1"], r"rollout\.top_k: expected 0 or more, got -1"),
        (["--entropy.reference_length", "-3"], r"entropy\.reference_length: .*got -3\. Leave "),
        (["--train.workspace_mib", "0"], r"train\.workspace_mib: expected a positive number"),
        (["--train.threads", "-2"], r"train\.threads: expected 0 or more, got -2"),
        (["--train.timeout", "inf"], r"train\.timeout: expected a positive number, got inf"),
        (["--eval.every", "-1"], r"eval\.every: expected 0 or more, got -1"),
        (["--eval.limit", "-1"], r"eval\.limit: expected 0 or more"),
        (
            ["--optim.lr", "-1"],
            r"optim\.lr: expected 0 or more, got -1\.0\. Type --optim\.lr 5e-",
        ),
        (["--optim.lr", "nan"], r"optim\.lr: expected 0 or more, got nan"),
        (["--optim.betas", "0.9", "1"], r"optim\.betas: expected numbers in \[0, 1\), got \[0\.9"),
        (["--entropy.tau", "nan"], r"entropy\.tau: expected a number, got nan"),
        (
            ["--rewards.weights", "1", "nan"],
            r"rewards\.weights: expected a number, got \[1\.",
        ),
        (["--rollout.temperature", "nan"], r"rollout\.temperature: expected a number.*got nan"),
        (["--rollout.temperature", "inf"], r"rollout\.temperature: expected a number.*got inf"),
        (
            ["--phases.0.sequences_per_step", "0"],
            r"phases\.0\.sequences_per_step: .* got 0\. Type --phases\.0\.sequences_per_step 64",
        ),
        (["--phases.1.lr", "-1"], r"phases\.1\.lr: expected 0 or more, got -1"),
        (["--model.build.num_heads", "0"], r"model\.build\.num_heads: expected a positive"),
        (["--report.probe_prompts", "-1"], r"report\.probe_prompts: expected 0 or more"),
        (["--seed", "5000000000"], r"seed: expected a number in 0 \.\. 2\*\*32 - 1"),
    ],
)
def test_cross_field_checks(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arguments(arguments)


def test_every_range_and_choice_is_of_an_option_that_exists() -> None:
    for name in RANGES:
        owner: object = Config()
        for part in name.split("."):
            owner = getattr(owner[0] if isinstance(owner, tuple) else owner, part)
    assert dispatch.BACKENDS == LOSS_BACKENDS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--objective.kl_estimator k9",
            "objective.kl_estimator: expected one of ['k1', 'k2', 'k3'], got 'k9'.",
        ),
        (
            "--objective.clip_low 1.5",
            "got 1.5. Leave --objective.clip_low out for the default of crpo.",
        ),
        ("--objective.clip_high -1", "objective.clip_high: expected a finite number in [0.0, inf]"),
        ("--objective.kl_coef inf", "objective.kl_coef: expected a finite number"),
        ("--objective.rho_mode mask --objective.rho_floor 2", "objective.rho_floor: expected"),
        (
            "--entropy.alarm_warn_factor 0.5",
            "1 < warn <= stop, got 0.5 and 10.0. Type --entropy.alarm_warn_factor 3.0",
        ),
        (
            "--entropy.alarm_floor 0",
            "entropy.alarm_floor: expected more than 0 nats, got 0.0. Type --entropy.alarm_floor",
        ),
    ],
)
def test_numbers_of_loss_and_alarm_are_refused_before_anything_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    folder = tmp_path / "run"
    assert train.main(["--run.dir", str(folder), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "ObjectiveSpec" not in error
    assert not folder.exists()


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
