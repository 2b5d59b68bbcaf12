"""What is measured beside seconds (clock.py): bytes, errors against fp64, the machine."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import statistics
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .baselines import Candidate, Result, objective
from .cases import Inputs
from .memory import counting

ROOT = Path(__file__).resolve().parent.parent
SLAB = 1 << 14  # rows of the head that are fp64 at once


def memory_of(candidate: Candidate, inputs: Inputs) -> dict[str, int]:
    """Peak bytes beyond the inputs of one forward and backward.

    ``extra_bytes`` counts everything, both gradients included; ``workspace_bytes`` is without the
    gradients that backward returns. On a CPU no code is generated under the counter: our row passes
    run eagerly here, with two scratch buffers of a few rows more.
    """
    forward: list[int] = []
    with counting(inputs.hidden.device, inputs.tensors()) as counter:
        watched = replace(inputs, on_backward=lambda: forward.append(counter.restart()))
        result = candidate.step(watched)
        last = counter.peak
    returned = sum(
        g.numel() * g.element_size() for g in (result.d_hidden, result.d_weight) if g is not None
    )
    workspace = max([*forward, last - returned])
    return {"extra_bytes": max([*forward, last]), "workspace_bytes": workspace}


def exact_result(inputs: Inputs, columns: Tensor, with_entropy: bool) -> Result:
    """Everything in fp64 for a few rows; d_weight only of the vocabulary's ``columns``.

    The weight becomes fp64 in slabs: memory is some fp64 [T, V], whatever D is.
    """
    hidden, weight = inputs.hidden.detach().double(), inputs.weight.detach()
    raw = exact_logits(hidden, weight).requires_grad_()  # [t, V]
    log_p = (raw / inputs.case.temperature).log_softmax(1)
    logprobs = log_p.gather(1, inputs.labels.unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    loss = objective(inputs, logprobs, entropy if with_entropy else None)
    (d_raw,) = torch.autograd.grad(loss, raw)
    d_hidden = torch.zeros_like(hidden)
    for first in range(0, weight.shape[0], SLAB):
        d_hidden.addmm_(d_raw[:, first : first + SLAB], weight[first : first + SLAB].double())
    d_weight = d_raw[:, columns].t() @ hidden
    return Result(loss.detach(), d_hidden, d_weight, logprobs.detach(), entropy.detach())


def exact_logits(hidden: Tensor, weight: Tensor) -> Tensor:  # [T, V]
    """``hidden`` ``[T, D]`` in fp64 times the head ``[V, D]`` of any dtype."""
    raw = hidden.new_empty(hidden.shape[0], weight.shape[0])
    for first in range(0, weight.shape[0], SLAB):
        raw[:, first : first + SLAB] = hidden @ weight[first : first + SLAB].double().t()
    return raw


def errors(candidate: Candidate, inputs: Inputs, truth: Result, columns: Tensor) -> dict:
    """Relative rms errors against fp64 on the rows of ``inputs``; absolute ones for nats."""
    got = candidate.step(inputs)
    d_weight = None if got.d_weight is None else got.d_weight[columns]
    values = {
        "d_hidden_rel_rms": (got.d_hidden, truth.d_hidden),
        "d_weight_rel_rms": (d_weight, truth.d_weight),
        "logprobs_rms": (got.logprobs, truth.logprobs),
        "entropy_rms": (got.entropy, truth.entropy),
    }
    return {
        name: rms(value, true, relative="rel" in name)
        for name, (value, true) in values.items()
        if value is not None and true is not None
    }


def rms(value: Tensor, truth: Tensor, *, relative: bool) -> float:
    """Root mean square of the difference, or that over the root mean square of ``truth``."""
    difference = (value.double() - truth).square().mean()
    return float((difference / truth.square().mean() if relative else difference).sqrt())


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


RUN_FROM = ("kernels", "crpo_fast", "configs", "benchmarks/*.py")  # what decides a result


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Where and with what a run was made; with a CUDA ``device`` what that is."""
    packages = ("torch", "triton", "trl", "liger-kernel", "transformers")
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
        **({} if device is None or device.type != "cuda" else {"gpu": gpu(device)}),
    }


def gpu(device: torch.device) -> dict[str, object]:
    """Name, memory, driver and versions of a CUDA (ROCm) device, and its clocks as found."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": nvidia_smi(device, "driver_version"),
        "clocks_and_power": nvidia_smi(
            device, "clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu"
        ),
    }


def gpu_name(where: dict[str, Any]) -> str:
    """The name of the GPU in what `machine` returned, "" without one."""
    return where.get("gpu", {}).get("name", "")


def nvidia_smi(device: torch.device, query: str) -> str:
    """What nvidia-smi answers about ``device``, or why it does not."""
    if shutil.which("nvidia-smi") is None:
        return "unknown: no nvidia-smi"
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() or f"unknown: {done.stderr.strip()[:200]}"


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
