"""What a person sees: the live line on a terminal, plain lines in a pipe, --quiet, first screen."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import children
from crpo_fast import screen, timing, train
from crpo_fast.config import Config
from crpo_fast.console import Reporter, fit
from crpo_fast.watch import PhaseLine

ROOT = Path(__file__).parent.parent
TINY = str(Path(__file__).with_name("tiny.toml"))
FIELDS = [(0, "crpo 3/9"), (1, "reward 0.500"), (3, "F1 61.2 (before)"), (2, "eta 1:05")]
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """A pseudo terminal; what was written to it so far."""

    def __init__(self) -> None:
        self.main, self.other = os.openpty()
        self._read: list[bytes] = []
        self._thread = threading.Thread(target=self._drain)
        self._thread.start()

    def _drain(self) -> None:
        while True:
            try:
                data = os.read(self.main, 65536)
            except OSError:  # all writers are gone
                return
            if not data:
                return
            self._read.append(data)

    def text(self) -> str:
        """All of it, once nobody writes any more."""
        self._thread.join(timeout=30)
        os.close(self.main)
        return b"".join(self._read).decode()


def shown(text: str) -> list[str]:
    """Every line and every state of the live line, without control characters."""
    return [ESCAPE.sub("", part).rstrip() for part in re.split(r"[\r\n]+|\x1b\[2K", text)]


def test_fields_of_the_largest_numbers_go_first() -> None:
    assert fit(FIELDS) == "crpo 3/9  reward 0.500  F1 61.2 (before)  eta 1:05"
    assert fit(FIELDS, 40) == "crpo 3/9  reward 0.500  eta 1:05"
    assert fit(FIELDS, 25) == "crpo 3/9  reward 0.500"
    assert fit(FIELDS, 8) == "crpo 3/9"
    assert fit(FIELDS, 6) == "crp..."
    assert all(len(fit(FIELDS, width)) <= width for width in range(60))


@pytest.mark.parametrize("width", [30, 100])
def test_live_line_on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    with os.fdopen(terminal.other, "w") as stream:
        reporter = Reporter(stream=stream)
        reporter.start()
        reporter.screen("a title", [("model", "x " * 40)])
        reporter.step(FIELDS)
        with timing.timer("generation"):
            timing.set_detail("5 of 8")
            time.sleep(0.6)
        reporter.line("a line above")
        reporter.step([(0, "crpo 9/9"), (1, "reward 1.000")], last=True)
        reporter.close()
    text = terminal.text()
    lines = shown(text)
    assert max(map(len, lines)) <= width
    if width == 100:
        assert any(x.startswith(f"{fit(FIELDS)}  generation 0:00 (5 of 8)") for x in lines)
    else:
        assert any(x.startswith("crpo 3/9") for x in lines)
    assert "a line above" in lines
    assert "crpo 9/9  reward 1.000" in lines
    assert not COLOUR.search(text)
    assert text.count("\x1b[?25h") >= 1  # the cursor stays
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_plain_lines_in_a_pipe_are_thinned_out() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream=stream, every_seconds=1000)
    reporter.start()
    reporter.screen("title", [("run", "r"), ("model", "m")])
    for step in range(1, 10):
        reporter.step([(0, f"sft {step}/9"), (9, "grad 1.00")], first=step == 1, last=step == 9)
    reporter.warning("look\x1b[2Jhere\x07")
    reporter.table("scores", ["set", "F1"], [["a", "1.0"], ["long", "22.0"]])
    reporter.close()
    assert stream.getvalue().splitlines() == [
        "title",
        "  run         r",
        "  model       m",
        "sft 1/9  grad 1.00",
        "sft 9/9  grad 1.00",
        "warning: look[2Jhere",
        "scores",
        "set     F1",
        "a      1.0",
        "long  22.0",
    ]


def test_a_pipe_gets_a_line_between_by_time() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream=stream, every_seconds=0.0)
    for step in range(1, 4):
        reporter.step([(0, f"sft {step}/9")])
    assert stream.getvalue().split("\n")[:-1] == ["sft 1/9", "sft 2/9", "sft 3/9"]


def test_a_long_generation_shows_life_in_a_pipe() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream=stream, alive_seconds=0.1)
    reporter.start()
    reporter.begin([(0, "crpo 0/9")])
    with timing.timer("generation"):
        timing.set_detail("3 of 8")
        time.sleep(0.5)
    reporter.close()
    lines = stream.getvalue().splitlines()
    assert lines
    assert set(lines) == {"crpo 0/9  generation for 0:00 (3 of 8)"}


def test_warnings_of_the_start_stand_after_the_screen() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream=stream)
    reporter.warning("early")
    assert stream.getvalue() == ""
    reporter.screen("title", [])
    reporter.warning("late")
    assert stream.getvalue().splitlines() == ["title", "warning: early", "warning: late"]


def test_quiet_leaves_warnings_and_closing_lines() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream=stream, quiet=True)
    reporter.start()
    reporter.screen("title", [("run", "r")])
    reporter.line("a line")
    reporter.step(FIELDS, first=True, last=True)
    reporter.warning("w")
    reporter.closing("c")
    reporter.close()
    assert stream.getvalue().splitlines() == ["warning: w", "c"]


def test_other_ranks_are_silent() -> None:
    stream = io.StringIO()
    reporter = Reporter(enabled=False, stream=stream)
    reporter.start()
    reporter.line("a")
    reporter.warning("b")
    reporter.closing("c")
    reporter.step(FIELDS, last=True)
    reporter.table("t", ["x"], [["y"]])
    reporter.close()
    assert stream.getvalue() == ""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_line_of_a_step() -> None:
    clock = Clock()
    line = PhaseLine("crpo", 10, ["first", "second"], floor=0.2, clock=clock)
    assert fit(line.begin(4)) == "crpo 4/10"
    metrics = {"reward": 0.5, "loss": 0.25, "tokens": 300.0, "grad_norm": 1.5, "kl": 0.001}
    metrics |= {"clip_fraction": 0.0, "stage_entropy/0": 0.1, "stage_entropy/1": 0.4}
    before = {"untrained": {"weighted_f1": 1.0, "step": 0}}
    clock.now = 3.0
    assert fit(line.after(5, {**metrics, "completions/right": 0.25}, before)) == (
        "crpo 5/10  reward 0.500  right 25.0 % (sampled)  worst stage second 0.40 (1.0x start)  "
        "kl 0.0010  clip 0.000  loss 0.2500  grad 1.50  100 tok/s  eta 0:15"
    )
    clock.now = 4.0
    evaluations = {**before, "before": {"weighted_f1": 57.04, "step": 4}}
    evaluations["step_5"] = {"weighted_f1": 60.0, "step": 5}
    later = {**metrics, "stage_entropy/0": 0.3, "stage_entropy/1": 0.44, "skipped": 1.0}
    found = fit(line.after(6, later, evaluations))
    # 0.3 is thrice its start and 1.5 times the floor, 0.44 is 1.1 times its start
    assert "F1 60.0 (step 5)  worst stage first 0.30 (3.0x start)" in found
    assert "skipped 1  150 tok/s  eta 0:08" in found
    targets = {**later, "stage_target/0": 0.25, "stage_target/1": 1.0}
    assert "worst stage second 0.44 (0.4x target)" in fit(line.after(7, targets, evaluations))


def test_stages_of_a_resumed_phase_are_compared_with_its_first_step() -> None:
    records = [{"stage_entropy/0": None}, {"stage_entropy/0": 0.5}, {"stage_entropy/0": 2.0}]
    line = PhaseLine("crpo", 10, ["only"], floor=0.2, records=records)
    metrics = {"reward": None, "loss": None, "tokens": 1.0, "stage_entropy/0": 1.0}
    found = fit(line.after(4, metrics, {}))
    assert "worst stage only 1.00 (2.0x start)" in found
    assert "reward ?" in found
    assert "loss ?" in found
    gone = fit(line.after(5, {**metrics, "stage_entropy/0": None}, {}))
    assert "no stage found" in gone
    certain = {**metrics, "stage_entropy/0": 0.0}
    assert "worst stage only 0.00 (0.0x start)" in fit(line.after(6, certain, {}))
    certain["stage_target/0"] = 0.5
    assert "worst stage only 0.00 (0.0x target)" in fit(line.after(7, certain, {}))
    line = PhaseLine("crpo", 10, ["only"], floor=0.2, records=[{"stage_entropy/0": 0.0}])
    assert "worst stage only 1.00 (started at 0)" in fit(line.after(4, metrics, {}))


def test_first_screen_says_what_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train.main([TINY, "--run.dir", str(tmp_path / "r"), "--train.max_steps", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("warning: "))
    rows = {x[2:13].strip(): x[14:] for x in lines[1:end] if x[2:13].strip()}
    assert end <= 20
    assert max(map(len, lines[:end])) <= 110
    assert rows["model"] == ("built here: llama, 1 layer, hidden 16, vocabulary 700, tied head")
    assert rows["parameters"].startswith("13.2 K, all trained; 0.2 MiB a rank with gradients")
    assert rows["ranks"].startswith("1 on cpu, ")
    assert rows["dtype"] == "float32 compute (by model.compute_dtype), float32 masters"
    assert rows["attention"] == "sdpa_packed: sdpa, as flash attention does not run on cpu"
    assert rows["blocks"] == "plain: Liger's kernels need a GPU, this is cpu"
    assert rows["loss"].startswith("backend torch (triton does not run: ")
    assert "row passes eager: the call has too few logits to pay" in " ".join(
        x.strip() for x in lines[:end]
    )
    assert rows["rollouts"].startswith("static (by rollout.engine): one padded batch")
    assert rows["data"].startswith("synthetic: 32 train rows, 32 cold-start; 64 test rows in 8")
    assert rows["phases"] == "sft 1 steps, then crpo 1 steps"
    assert "entropy.reference_length 80" in lines[end]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores have no affinity here")
def test_threads_are_compared_with_the_cores_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    session: Any = SimpleNamespace(
        config=Config(),
        world=SimpleNamespace(device=torch.device("cpu")),
        task=SimpleNamespace(grammar=SimpleNamespace(num_stages=0)),
    )
    count = 4 * torch.get_num_threads()
    assert f"{count} threads on 1 cores. Type --train.threads 0." in screen.warnings(session)


def test_quiet_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--run.dir", str(tmp_path / "r"), "--train.max_steps", "1", "--quiet"]
    assert train.main([TINY, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("warning: entropy.magnitude")
    assert lines[1] == "weighted F1 and format rate on held-out rows, percent"
    assert lines[-3].startswith(f"model: {tmp_path / 'r' / 'final'}")
    assert lines[-2] == f"report: {tmp_path / 'r' / 'report.html'}"
    assert lines[-1].startswith("wall time ")
    assert not [x for x in lines if x.startswith(("phase", "sft", "crpo", "evaluation"))]


def test_a_run_on_a_terminal(tmp_path: Path) -> None:
    """The real thing in 80 columns: the live line says what goes on and never wraps."""
    terminal = Terminal()
    environment = children.environment(TERM="xterm", NO_COLOR="1")
    environment.pop("COLUMNS", None)
    command = [sys.executable, str(ROOT / "crpo_fast" / "train.py"), TINY, "--train.max_steps", "2"]
    done = subprocess.run(
        [*command, "--run.dir", str(tmp_path / "r"), "--train.threads", "1"],
        stdout=terminal.other,
        stderr=terminal.other,
        stdin=subprocess.DEVNULL,
        env=environment,
        timeout=200,
        check=False,
    )
    os.close(terminal.other)
    text = terminal.text()
    assert done.returncode == 0, text
    lines = shown(text)
    # whatever part a quarter of a second meets
    assert any(re.search(r"\b(?!eta )[a-z]+ 0:\d\d( \(|$)", x) for x in lines)
    assert any(re.match(r"sft 2/2 +loss", x) for x in lines)
    assert any(re.match(r"crpo 2/2 +reward", x) for x in lines)
    first_screen = text[: text.index("warning: ")].split("\r\n")[:-1]
    assert len(first_screen) <= 20
    live = [x for x in lines if re.match(r"(sft|crpo) \d/2|load ", x)]
    assert max(map(len, live)) <= 80
    assert not COLOUR.search(text)
