"""The loop end to end on a model of some thousand parameters: phases, resume, refusals, files."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import children
from crpo_fast import train
from crpo_fast.alarm import EntropyAlarm, Verdict
from crpo_fast.stages import StageGrammar

ROOT = Path(__file__).parent.parent
TINY = str(Path(__file__).with_name("tiny.toml"))


def run(run_dir: Path, *arguments: str, config: str = TINY) -> int:
    return train.main([config, "--run.dir", str(run_dir), *arguments])


def records(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "tokens_per_second")
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines
    ]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run") / "r"
    assert run(run_dir) == 0
    return run_dir


def test_run_folder(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["seed"] == 5
    assert summary["seconds"] > 0
    for part in ("before", "after"):
        assert {"weighted_f1", "format_rate", "per_dataset"} <= summary[part].keys()
        assert len(summary[part]["per_dataset"]) == 8
        f1 = [d["weighted_f1"] for d in summary[part]["per_dataset"].values()]
        assert summary[part]["weighted_f1"] == pytest.approx(sum(f1) / 8)
    logged = records(finished)
    assert [r["phase"] for r in logged] == ["sft"] * 4 + ["crpo"] * 4
    assert [r["step"] for r in logged] == list(range(1, 9))
    assert logged[0]["loss"] > logged[3]["loss"]  # the cold start learns
    plots = {p.stem for p in (finished / "plots").iterdir()}
    assert plots == {"reward", "entropy", "loss", "kl", "length"}
    # the model writes no stage
    assert "stimulus: no values" in (finished / "plots" / "entropy.svg").read_text()
    assert (finished / "config.toml").exists()


def test_every_stage_tag_is_one_token_of_the_trained_tokenizer(finished: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished / "final")
    for tag in StageGrammar.preset("mental_r1").tags:
        assert len(tokenizer(tag, add_special_tokens=False).input_ids) == 1, tag


def test_final_folder_loads_in_transformers(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "final")
    tokenizer = AutoTokenizer.from_pretrained(finished / "final")
    ids = tokenizer("rate the stress", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > ids.shape[1]


def test_finished_run_prints_its_summary(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.jsonl").read_text()
    assert run(finished) == 0
    out = capsys.readouterr().out
    assert "is finished" in out
    assert "weighted F1" in out
    assert (finished / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("steps", [1, 2])
def test_resume_equals_an_uninterrupted_run(finished: Path, tmp_path: Path, steps: int) -> None:
    """Capped in both phases, then continued: same weights, same metrics, to the bit."""
    run_dir = tmp_path / "r"
    assert run(run_dir, "--train.max_steps", str(steps)) == 0
    assert len(records(run_dir)) == 2 * steps
    assert run(run_dir) == 0
    assert records(run_dir) == records(finished)
    expected, found = weights(finished), weights(run_dir)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_resume_in_the_middle_of_the_second_phase(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    shutil.copytree(finished, run_dir)
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "final")
    for step in (7, 8):
        shutil.rmtree(run_dir / "checkpoints" / f"step_{step}")
    assert run(run_dir) == 0
    assert records(run_dir) == records(finished)
    assert all(torch.equal(weights(run_dir)[k], v) for k, v in weights(finished).items())


def test_torn_checkpoint_is_skipped_and_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "r"
    shutil.copytree(finished, run_dir)
    (run_dir / "summary.json").unlink()
    (run_dir / "checkpoints" / "step_8" / "state.json").unlink()
    (run_dir / "checkpoints" / "step_9.tmp").mkdir()
    assert run(run_dir) == 0
    out = capsys.readouterr().out
    assert "step_8: not a whole checkpoint" in out
    assert "step_7 (step 7)" in out
    assert records(run_dir) == records(finished)


def test_another_config_in_the_folder_is_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(p.name for p in finished.iterdir())
    assert run(finished, "--optim.lr", "0.5") == 2
    err = capsys.readouterr().err
    assert "optim.lr: 0.01 -> 0.5" in err
    assert "--run.dir" in err
    assert sorted(p.name for p in finished.iterdir()) == before


def test_resume_never_moves_the_old_run_aside(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    shutil.copytree(finished, run_dir)
    assert run(run_dir, "--run.resume", "never", "--train.max_steps", "1") == 0
    assert len(records(run_dir)) == 2
    (old,) = tmp_path.glob("r.old-*")
    assert len(records(old)) == 8


def test_checkpoints_are_pruned_but_phase_ends_stay(finished: Path) -> None:
    names = {p.name for p in (finished / "checkpoints").iterdir()}
    assert names == {"best", "latest", "step_4", "step_6", "step_7", "step_8"}
    assert (finished / "checkpoints" / "latest").read_text() == "step_8"


def test_nan_weights_stop_the_run_with_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "r", "--optim.lr", "1e30") == 1
    err = capsys.readouterr().err
    assert "not finite" in err
    assert "optim.lr" in err


def test_entropy_alarm_saves_and_stops_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(
        self: EntropyAlarm, step: int, entropies: list[float | None], targets: tuple[None, ...]
    ) -> Verdict:
        assert (len(entropies), targets) == (5, (None,) * 5)
        return Verdict(("stage 'stimulus' grows",), self._message(0, step, 9.0, 0.2, 10.0))

    monkeypatch.setattr(EntropyAlarm, "update", explode)
    run_dir = tmp_path / "r"
    assert run(run_dir, "--checkpoint.every", "0") == 1
    captured = capsys.readouterr()
    assert "warning: stage 'stimulus' grows" in captured.out
    assert "at step 5" in captured.err
    assert "entropy.reference_length" in captured.err
    assert 'entropy.controller = "dual"' in captured.err
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_5"
    assert run(tmp_path / "off", "--entropy.no-alarm") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.path", "no/such/folder"], "model.path: expected a model folder"),
        (["--data.format", "official", "--data.root", "no/such/root"], "no/such/root"),
        (["--grammar.preset", "mental_r2"], "mental_r1"),
        (["--rewards.functions", "crpo_fast.rewards:nothing"], "nothing"),
        (
            ["--data.max_prompt_tokens", "24"],
            (
                "data.max_prompt_tokens: expected at least 25 (system prompt, instruction and "
                "prefill alone, data set 'LID'), got 24. Type --data.max_prompt_tokens 153"
            ),
        ),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(tmp_path / "r", *arguments) == 2
    assert message in capsys.readouterr().err


def test_stage_tags_that_are_prefixes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        Path(TINY).read_text() + "[[stages]]\nname = 'mental'\n[[stages]]\nname = 'mental_state'\n"
    )
    assert run(tmp_path / "r", config=str(config)) == 2
    assert "prefix" in capsys.readouterr().err


def command(run_dir: Path, *arguments: str, ranks: int = 1) -> list[str]:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
    ]
    return [
        *launch,
        str(ROOT / "crpo_fast" / "train.py"),
        TINY,
        "--run.dir",
        str(run_dir),
        *arguments,
    ]


@pytest.mark.multirank
def test_two_ranks_train_and_agree_on_the_first_step(finished: Path, tmp_path: Path) -> None:
    """The cold start sees the same sequences at any number of ranks, so its losses agree."""
    done = subprocess.run(
        command(tmp_path / "r", ranks=2), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = records(finished), records(tmp_path / "r")
    assert len(two) == 8
    for a, b in zip(one[:4], two[:4], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


@pytest.mark.multirank
def test_sigterm_saves_and_the_same_command_continues(tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    slow = ["--phases.0.steps", "4000", "--checkpoint.every", "0", "--optim.schedule", "constant"]
    arguments = [
        sys.executable,
        str(ROOT / "crpo_fast" / "train.py"),
        TINY,
        "--run.dir",
        str(run_dir),
        *slow,
    ]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        arguments, stdout=pipe, stderr=pipe, text=True, env=children.environment()
    )
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]
    assert "The same command continues" in out
    done = len(records(run_dir))
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{done}"
