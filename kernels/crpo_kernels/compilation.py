"""Whether generated row passes can run and pay: a predicate with a reason, asked beforehand."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from functools import lru_cache

import torch
from torch import Tensor

COMPILE_ELEMENTS = 1 << 27  # logits of a call above which compiling for 20 s is worth its time


def uncompiled_reason(hidden: Tensor, num_rows: int, vocab_size: int) -> str | None:
    """Why the row passes run as ordinary torch operations, or None where they are compiled."""
    if hidden.device.type != "cpu":
        return "the row passes are compiled on a CPU only"
    if hidden.dtype == torch.float64:
        return "fp64 is for checking, not for speed"
    if num_rows * vocab_size <= COMPILE_ELEMENTS:
        return "the call has too few logits to pay for a compilation"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a TorchDispatchMode is active, under which torch.compile does not generate code"
    return missing_toolchain()


@lru_cache(maxsize=1)
def missing_toolchain() -> str | None:
    """What torch.compile would miss on a CPU: itself, a C++ compiler, Python's or OpenMP's headers.

    Asks the compiler that torch would take to read those headers (a tenth of a second, once).
    """
    import torch._dynamo.config as dynamo  # only here: importing them takes a second
    import torch._inductor.config as inductor

    if dynamo.disable:
        return "torch.compile is switched off"
    wanted = inductor.cpp.cxx
    names = wanted if isinstance(wanted, list | tuple) else (wanted,)
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        return f"no C++ compiler ({', '.join(name for name in names if name)}) on PATH"
    result = subprocess.run(
        [found, "-x", "c++", "-fsyntax-only", "-I", sysconfig.get_paths()["include"], "-"],
        input="#include <Python.h>\n#include <cmath>\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if result.returncode != 0:
        return f"{found} cannot compile against Python.h: {result.stderr.strip()[:200]}"
    return None
