"""What a run was started with: starts.jsonl, one record per start, for the report."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from crpo_fast.metrics import JsonLines

_PACKAGES = ("crpo-fast", "torch", "transformers", "numpy", "triton", "flash-attn")
_CODE = Path(__file__).resolve().parent.parent


def record_start(run_dir: Path, *, step: int, ranks: int, device: str) -> None:
    """Append what is known of this start to starts.jsonl (rank 0).

    Args:
        run_dir: of the run.
        step: that it continues from; 0 = the beginning.
        ranks: processes.
        device: "cpu" or "cuda".
    """
    record: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join(sys.argv),
        "ranks": ranks,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }
    JsonLines(run_dir / "starts.jsonl").write(record)


def versions() -> dict[str, str]:
    """Of Python and the packages that matter for the numbers, where they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with the build, e.g. +cpu
    return found


def machine(device: str) -> str:
    """Processor or GPU, cores and system; no name of the host or its user."""
    system = f"{platform.system()} {platform.machine()}"
    cores = f"{os.cpu_count()} cores"
    if device == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{len(names)} x {names[0]}, {cores}, {system}"
    return f"{_cpu_name()}, {cores}, {system}"


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "CPU"


def commit() -> str:
    """The commit of the code with "+" where tracked files differ; "" outside a checkout."""
    if not (_CODE / ".git").exists():
        return ""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_CODE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
