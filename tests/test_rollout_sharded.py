"""Both embedded engines on a model sharded over two ranks that generate different amounts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("rollout_worker.py")


@pytest.mark.multirank
def test_rollouts_of_a_sharded_model(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(WORKER), str(out)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = json.loads(out.read_text())
    assert [len(results) for results in ranks] == [4, 4]
    for results in ranks:
        for name, result in results.items():
            assert max(result["errors"]) < 1e-5, (name, result)  # of the new weights as well
            assert result["sharded"], name
            assert result["export"], name
