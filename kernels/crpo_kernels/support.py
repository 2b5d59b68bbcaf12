"""What the Triton kernels need, asked beforehand: predicates with a reason, triton not imported.

Reading a version from a package's files and asking the driver for a compute capability are free of
side effects; importing triton, let alone compiling to see whether it works, is not.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)  # bf16 tensor cores
INTERPRETER = "TRITON_INTERPRET"


class Obstacle(NamedTuple):
    """Why something cannot run, and what to type to have it."""

    reason: str
    remedy: str


def triton_obstacle(
    device: torch.device, dtype: torch.dtype, *, is_fake: bool = False
) -> Obstacle | None:
    """What keeps the Triton kernels from running on tensors of this device and dtype, or None.

    On fake tensors, on which memory is planned, no kernel runs: any device will do.
    """
    version = triton_version()
    if version is None:
        return Obstacle("Triton is not installed", "Type pip install 'triton>=3.6'")
    if release(version) < MIN_TRITON:
        return Obstacle(
            f"Triton {version} is installed, the kernels need 3.6 or newer",
            "Type pip install 'triton>=3.6'",
        )
    if dtype == torch.float64:
        return Obstacle(
            "hidden is float64, which is for checking and has no Triton kernels",
            "Pass bfloat16 or float32 tensors",
        )
    if dtype not in (torch.bfloat16, torch.float32):
        return Obstacle(
            f"the kernels take bfloat16 and float32, hidden is {dtype}",
            "Pass bfloat16 or float32 tensors",
        )
    if is_fake:
        return None
    if device.type == "cuda":
        return _gpu_obstacle(device)
    if device.type != "cpu":
        return Obstacle(
            f"no GPU: hidden is on {device.type}, the kernels run on CUDA and ROCm devices",
            "Move the tensors to a CUDA or ROCm device",
        )
    return _interpreter_obstacle(version)


def triton_version() -> str | None:
    """The version of the importable triton, None without one; triton is not imported for it."""
    loaded = sys.modules.get("triton")
    if loaded is not None:
        return str(getattr(loaded, "__version__", "0"))
    spec = None
    with suppress(ModuleNotFoundError):  # how some import hooks say that there is none
        spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return _written_version(spec.origin)


@lru_cache(maxsize=4)
def _written_version(path: str) -> str:
    """``__version__`` as a package's first file has it: its distribution goes by several names."""
    found = re.search(
        r"^__version__\s*=\s*['\"]([^'\"]+)", Path(path).read_text(encoding="utf-8"), re.MULTILINE
    )
    return found[1] if found else "0"


def release(version: str) -> tuple[int, ...]:
    """The numbers a version begins with: "3.10.0+git1" -> (3, 10, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else (0,)


def _gpu_obstacle(device: torch.device) -> Obstacle | None:
    """On CUDA and ROCm; without a GPU here the tensors are fake and a plan is made for one."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < MIN_CAPABILITY:
        return Obstacle(
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, the kernels need 8.0 or newer",
            "Take an A100 or a newer GPU",
        )
    return _toolchain_obstacle(os.environ.get("CC"))


@lru_cache(maxsize=4)
def _toolchain_obstacle(compiler: str | None) -> Obstacle | None:
    """Triton compiles its launcher with a C compiler against Python's headers, once a machine."""
    if not any(shutil.which(name) for name in ((compiler,) if compiler else ("gcc", "clang"))):
        return Obstacle(
            f"Triton needs a C compiler for its launcher, and {compiler or 'gcc or clang'} is not "
            "on PATH",
            "Type apt install gcc, or set CC",
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return Obstacle(
            f"Triton needs Python's headers for its launcher, and {header} is missing",
            "Type apt install python3-dev, or take a Python that has them",
        )
    return None


def asks_for_interpreter() -> bool:
    """Whether TRITON_INTERPRET is on in the environment, read as triton reads it."""
    return os.environ.get(INTERPRETER, "").lower() in ("1", "true", "on", "yes", "y")


def unasked_reason(device: torch.device) -> str | None:
    """Why nobody takes the kernels on this device who was not told to, or None."""
    if device.type == "cpu" and not asks_for_interpreter():
        return "no GPU"
    return None


def _interpreter_obstacle(version: str) -> Obstacle | None:
    """On a CPU, where only the interpreter runs the kernels."""
    restart = f"Start python with {INTERPRETER}=1 set, or move the tensors to a GPU"
    if asks_for_interpreter() and importlib.util.find_spec("numpy") is None:
        return Obstacle("Triton's interpreter needs numpy", "Type pip install numpy")
    if "crpo_kernels.launch_triton" not in sys.modules and not asks_for_interpreter():
        return Obstacle(
            "no GPU: hidden is on cpu, where the kernels run in Triton's interpreter alone "
            f"({INTERPRETER}=1)",
            restart,
        )
    if not _interpreted():
        return Obstacle(
            f"no GPU: hidden is on cpu, and the kernels were imported without {INTERPRETER}=1",
            restart,
        )
    numpy_version = _numpy_version()
    if release(version) < (3, 7) and release(numpy_version) >= (2, 4):
        return Obstacle(
            f"the interpreter of Triton {version} does not work with numpy {numpy_version}",
            "Type pip install 'triton>=3.7' or 'numpy<2.4'",
        )
    return None


def _interpreted() -> bool:
    from .launch_triton import is_interpreted  # imports triton: as late as possible

    return is_interpreted()


def _numpy_version() -> str:
    return str(sys.modules["numpy"].__version__)  # which the interpreter has imported


def describe_triton(device: torch.device) -> str:
    """Where the kernels run, for the log."""
    version = triton_version()
    if device.type == "cpu":
        return f"Triton {version}'s interpreter on the CPU ({INTERPRETER}=1)"
    if not torch.cuda.is_available():
        return f"Triton {version} on a GPU"
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return f"Triton {version} on {name}, compute capability {major}.{minor}"
