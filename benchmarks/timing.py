"""How things are measured: interleaved rounds, live tensor bytes, errors, the machine."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from .baselines import Candidate, Result, objective
from .cases import Inputs
from .memory import LiveBytes

ROOT = Path(__file__).resolve().parent.parent


def extra_bytes(candidate: Candidate, inputs: Inputs) -> int:
    """Peak live bytes beyond the inputs of one forward and backward, the two gradients included.

    No code is generated under this counter: our row passes run eagerly here, with two scratch
    buffers of a few rows more.
    """
    tensors = (getattr(inputs, name) for name in inputs.__dataclass_fields__ if name != "case")
    with LiveBytes(*tensors) as counter:
        candidate.step(inputs)
    return counter.peak


def measure_seconds(
    candidates: list[Candidate], inputs: Inputs, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of every timed step, in interleaved rounds so that drifts meet all candidates."""
    times: dict[str, list[float]] = {candidate.key: [] for candidate in candidates}
    for turn in range(max(candidate.rounds for candidate in candidates)):
        for candidate in candidates:
            if turn < candidate.rounds:
                begin = time.perf_counter()
                candidate.step(inputs)
                times[candidate.key].append(time.perf_counter() - begin)
                say(f"round {turn + 1}: {candidate.title}: {times[candidate.key][-1]:.2f} s")
    return times


def exact_result(inputs: Inputs, columns: Tensor, with_entropy: bool) -> Result:
    """Everything in fp64 for a few rows; d_weight only of the vocabulary's ``columns``."""
    hidden = inputs.hidden.detach().double().requires_grad_()
    raw = hidden @ inputs.weight.detach().double().t()  # [t, V]
    raw.retain_grad()
    log_p = (raw / inputs.case.temperature).log_softmax(1)
    logprobs = log_p.gather(1, inputs.labels.unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    loss = objective(inputs, logprobs, entropy if with_entropy else None)
    loss.backward()
    assert raw.grad is not None, "retained above"
    d_weight = raw.grad[:, columns].t() @ hidden.detach()
    return Result(loss.detach(), hidden.grad, d_weight, logprobs.detach(), entropy.detach())


def errors(candidate: Candidate, inputs: Inputs, truth: Result, columns: Tensor) -> dict:
    """Relative rms errors against fp64 on the rows of ``inputs``; absolute ones for nats."""
    result = candidate.step(inputs)
    if result.d_hidden is None or result.d_weight is None:
        return {}
    assert truth.d_hidden is not None, "the truth has everything"
    assert truth.d_weight is not None, "the truth has everything"
    found = {
        "d_hidden_rel_rms": _rms(result.d_hidden, truth.d_hidden, relative=True),
        "d_weight_rel_rms": _rms(result.d_weight[columns], truth.d_weight, relative=True),
    }
    if result.logprobs is not None and truth.logprobs is not None:
        found["logprobs_rms"] = _rms(result.logprobs, truth.logprobs, relative=False)
    if result.entropy is not None and truth.entropy is not None:
        found["entropy_rms"] = _rms(result.entropy, truth.entropy, relative=False)
    return found


def _rms(value: Tensor, truth: Tensor, *, relative: bool) -> float:
    difference = (value.double() - truth).square().mean()
    scale = truth.square().mean() if relative else torch.ones(())
    return float((difference / scale).sqrt())


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


RUN_FROM = ("kernels", "crpo_fast", "configs", "benchmarks/*.py")  # what decides a result


def machine() -> dict[str, object]:
    """Where and with what a run was made."""
    packages = ("torch", "trl", "liger-kernel", "transformers")
    installed = {
        d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions()
    }
    versions = {p: importlib.metadata.version(p) for p in packages if p in installed}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_meminfo_kib() / 2**20, 1),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
        "commit": commit(),
    }


def cpu_name() -> str:
    """The processor's name and the instructions that bf16 products use."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    lines = [line.split(":", 1) for line in path.read_text("utf-8").splitlines() if ":" in line]
    fields = {key.strip(): value.strip() for key, value in lines}
    flags = fields.get("flags", "").split()
    bf16 = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    name = fields.get("model name", platform.machine())
    cores = sum(1 for key, _ in lines if key.strip() == "processor")
    model = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{name} ({model}), {cores} cores, {' '.join(bf16) or 'no avx512'}"


def _meminfo_kib() -> float:
    path = Path("/proc/meminfo")
    return float(path.read_text("utf-8").split()[1]) if path.exists() else 0.0


def commit() -> str:
    """The commit of the working tree, marked where tracked files differ from it.

    In a folder without git it is what `git archive` wrote into `.git_archival.txt`; "unknown" where
    that was not expanded.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    top = git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != ROOT.resolve():  # none, or that of a folder around it
        found = (ROOT / ".git_archival.txt").read_text("utf-8").removeprefix("commit: ").strip()
        return "unknown" if "$" in found else found[:12]
    changed = git("status", "--porcelain", "--untracked-files=no", *RUN_FROM)
    return git("rev-parse", "--short=12", "HEAD") + (" + changes" if changed else "")
