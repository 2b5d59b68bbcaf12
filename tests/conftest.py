"""Fixtures and skips that all tests share, and what ``pytest -n`` needs (pytest-xdist).

Without a CUDA device this imports triton and our kernels for Triton's interpreter, before anything
else imports triton, and leaves TRITON_INTERPRET as it was (triton_tools.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported by any test
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: one worker a core, so one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import pytest
import torch

import triton_tools

triton_tools.import_interpreted()

ROOT = Path(__file__).resolve().parent.parent
MAX_WORKERS = 8  # the longest file alone takes a seventh of the whole
WORKER_BYTES = 2 << 30  # a worker and the two to four ranks that one of its tests may start
skip_counts: Counter[str] = Counter()


def missing(marker: str) -> str | None:
    """Returns why tests with this marker cannot run here, or None when they can."""
    if marker == "gpu" and not torch.cuda.is_available():
        return "needs a CUDA or ROCm device"
    if marker == "data" and not os.environ.get("CRPO_DATA"):
        return "needs the published data: set CRPO_DATA to its folder"
    if marker == "vllm" and importlib.util.find_spec("vllm") is None:
        return "needs vLLM"
    return None


def unasked(config: pytest.Config) -> str | None:
    """Returns why tests marked slow do not run, or None when the command asks for them."""
    named = re.search(r"\bslow\b", config.getoption("markexpr") or "")
    return None if named else "takes minutes; pytest -m slow runs it"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips marked tests whose means are not there, and slow ones nobody asked for."""
    skip_counts.clear()
    for marker in ("gpu", "data", "vllm", "slow"):
        reason = unasked(config) if marker == "slow" else missing(marker)
        marked = [item for item in items if item.get_closest_marker(marker)] if reason else []
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))
        if marked:
            skip_counts[f"{marker} ({reason})"] = len(marked)
    if note := getattr(config, "workerinput", {}).get("skip_note"):
        Path(note).write_text(json.dumps(skip_counts), encoding="utf-8")


def pytest_report_collectionfinish() -> list[str]:
    """Says how many tests will be skipped, by marker."""
    return [f"will skip {count} tests marked {why}" for why, count in skip_counts.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of ``-n auto``: one a core, as many as memory holds; none where a GPU is measured."""
    if torch.cuda.is_available():
        return 0
    from crpo_fast.distributed import num_cores

    held = psutil.virtual_memory().available // WORKER_BYTES
    return max(1, min(num_cores(), MAX_WORKERS, held))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay in one worker: its fixtures, often runs of several ranks, start once."""
    if config.getvalue("dist") != "load":  # the default of -n
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # files with most tests first leaves long ones for last
    return LoadFileScheduling(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tells a worker where to note what it skips."""
    handle, node.workerinput["skip_note"] = tempfile.mkstemp(prefix="crpo-fast-")
    os.close(handle)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any) -> None:
    """Says once what workers skip (they all collect the same): pytest itself does not."""
    note = Path(node.workerinput["skip_note"])
    counts = json.loads(note.read_text(encoding="utf-8"))
    note.unlink()
    if skip_counts:
        return
    skip_counts.update(counts)
    reporter = node.config.pluginmanager.get_plugin("terminalreporter")
    for line in pytest_report_collectionfinish():
        reporter.write_line(line)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries under test use the global state)
    torch.manual_seed(0)


@pytest.fixture
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture
def crpo_data() -> Path:
    """The folder of published data named by CRPO_DATA; skips when it is not set."""
    reason = missing("data")
    if reason:
        pytest.skip(reason)
    folder = Path(os.environ["CRPO_DATA"]).expanduser().resolve()
    assert folder.is_dir(), f"CRPO_DATA: expected a folder, got {folder}"
    return folder


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """torch's number of threads, which commands set for a whole process, is put back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def forget_graphs() -> Iterator[None]:
    """No graph of torch.compile comes from an earlier test or stays for a later one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def device() -> str:
    """Where kernels run in these tests: the device, or the CPU in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def noted_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """Kernels of tensors without values are noted, and triton may be asked for on them."""
    from crpo_kernels import dispatch

    monkeypatch.setattr(dispatch, "triton_obstacle", lambda *_, **__: None)
    if triton_tools.why_no_triton():
        yield []
        return
    from crpo_kernels.launch_triton import recording

    with recording() as launches:
        yield launches


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN or the largest integer: code that reads it fails."""
    triton_tools.poison_empty(monkeypatch)


@pytest.fixture
def guarded_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same with guards around it: code that writes beside its buffers fails."""
    check = triton_tools.guard_empty(monkeypatch)
    yield
    assert check(), "nothing was allocated with torch.empty, empty_like or new_empty"
