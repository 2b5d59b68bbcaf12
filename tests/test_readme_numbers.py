"""The numbers in the README are those of the committed result files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import readme

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_what_the_files_say() -> None:
    assert readme.fill(TEXT) == TEXT, "run `python -m benchmarks readme`"


@pytest.mark.parametrize("name", readme.BLOCKS)
def test_every_block_is_there_once(name: str) -> None:
    assert len(re.findall(rf"<!-- {name} -->\n.+?<!-- /{name} -->", TEXT, re.DOTALL)) == 1


def test_a_changed_number_is_noticed() -> None:
    number = re.search(r"<!-- loss -->.*?(\d\.\d+)", TEXT, re.DOTALL)
    if number is None or readme.load("loss_cpu") is None:
        pytest.skip("the loss is not measured yet")
    changed = TEXT[: number.start(1)] + "9.99" + TEXT[number.end(1) :]
    assert readme.fill(changed) == TEXT


def test_no_gpu_number_without_a_result_file() -> None:
    if (readme.RESULTS / "gpu_gate.json").exists():
        assert readme.GPU_NOT_MEASURED not in TEXT
        return
    assert readme.GPU_NOT_MEASURED in TEXT
    assert re.findall(r"\d ?ms\b|\b(?:H100|H200|A100|B200|MI300X?)\b", TEXT) == []


def test_a_rehearsal_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"key": "products", "title": "three", "missing": "x", "note": ""}]
    gpu = {"name": "Some GPU", "memory_gib": 1, "driver": "2", "cuda": "3", "clocks_and_power": "4"}
    machine = {"date": "d", "commit": "e", "python": "f", "versions": {}, "gpu": gpu}
    table = {"rows": rows, "targets": [], "stands_for": "T1", "case": "T1"}
    part = {"tables": [table], "checks": [], "not_run": [], "has_failed": False, "error": ""}
    report = {"note": "", "command": "c", "machine": machine, "parts": {"table": part}}
    report |= {"device": "Some GPU", "seconds": 1.0}
    part["seconds"] = 1.0
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    file = tmp_path / "gpu_gate.json"
    file.write_text(json.dumps(report), encoding="utf-8")
    assert "Some GPU, 1 GiB, driver 2, CUDA 3" in readme.gpu_block()
    file.write_text(json.dumps({**report, "note": "rehearsal"}), encoding="utf-8")
    assert readme.gpu_block() == readme.GPU_NOT_MEASURED
