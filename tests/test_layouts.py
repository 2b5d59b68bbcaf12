"""Gradients of one optimizer step do not depend on ranks, packing, tying or micro-batches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("layout_worker.py")
BOUNDS = {"torch.float64": 1e-10, "torch.float32": 2e-6}  # max |error| / max |gradient| per tensor


@pytest.mark.multirank
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_equal_the_dense_reference(ranks: int, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
    ]
    done = subprocess.run(
        [*command, str(WORKER), str(out)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(out.read_text())
    assert len(results) == 2 * 4 * 2 * 2
    wrong = [r for r in results if not r["error"] <= BOUNDS[r["dtype"]]]
    assert not wrong, wrong
    if ranks > 1:  # a rank with fewer micro-batches than the other ran dummies
        assert all(len(set(r["micro_batches"])) > 1 for r in results), results[0]
