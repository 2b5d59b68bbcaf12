"""Where and with what a run was made: processor, GPU, versions, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
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


def device_name(where: dict[str, Any]) -> str:
    """The name of what measured: the GPU, else the CPU."""
    return gpu_name(where) or where["cpu"]


def opening(title: str, report: dict[str, Any]) -> list[str]:
    """The first lines of a report's page: what it is about, where and how it was made."""
    where = "a GPU" if "gpu" in report["machine"] else "a CPU"
    return [f"# {title} on {where}", headline(report)]


def headline(report: dict[str, Any]) -> str:
    """Command, date, commit and machine of a report."""
    where = report["machine"]
    return f"`{report['command']}`, {where['date']}, commit {where['commit']}. {place(where)}"


def place(machine: dict) -> str:
    """Device and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    software = f"Python {machine['python']}, {versions}."
    if "gpu" not in machine:
        return (
            f"{machine['cpu']}, {machine['threads']} threads, {machine['memory_gib']} GiB; "
            f"{software}"
        )
    gpu = machine["gpu"]
    toolkit = f"ROCm {gpu['hip']}" if gpu.get("hip") else f"CUDA {gpu['cuda']}"
    return (
        f"{gpu['name']}, {gpu['memory_gib']} GiB, driver {gpu['driver']}, {toolkit}, "
        f"clocks and power {gpu['clocks_and_power']}; {software}"
    )


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
