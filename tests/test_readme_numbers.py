"""The numbers of the README and of docs/ are those of the committed result files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import report_cases
from benchmarks import plot, readme

TEXTS = {page.name: page.read_text(encoding="utf-8") for page in readme.PAGES}
TEXT = TEXTS["README.md"]


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_a_page_is_what_the_files_say(page: Path) -> None:
    text = TEXTS[page.name]
    assert readme.fill(text, readme.PAGES[page]) == text, "run `python -m benchmarks readme`"


@pytest.mark.parametrize("name", readme.BLOCKS)
def test_every_block_is_there_once(name: str) -> None:
    pattern = rf"<!-- {name} -->\n.+?<!-- /{name} -->"
    assert sum(len(re.findall(pattern, text, re.DOTALL)) for text in TEXTS.values()) == 1


def test_a_changed_number_is_noticed() -> None:
    number = re.search(r"<!-- quickstart -->.*?(\d\d\.\d)", TEXT, re.DOTALL)
    assert number is not None
    changed = TEXT[: number.start(1)] + "9.99" + TEXT[number.end(1) :]
    assert readme.fill(changed) == TEXT


@pytest.mark.parametrize("file", plot.committed(), ids=lambda file: file.stem)
def test_what_is_drawn_of_a_result_is_what_its_file_says(file: Path, tmp_path: Path) -> None:
    drawn = plot.draw(plot.read(file), tmp_path / file.stem)
    assert {path.name for path in drawn} == {
        path.name
        for pattern in (f"{file.stem}.*", f"{file.stem}_shapes.*")
        for path in file.parent.glob(pattern)
        if path.suffix in (".md", ".svg", ".csv")
    }
    for path in drawn:
        text = (file.parent / path.name).read_text(encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text, "run `python -m benchmarks plot`"


def test_a_block_is_what_its_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    command = "`python -m benchmarks loss --device cpu`"
    assert readme.BLOCKS["loss"]() == f"{readme.NOT_MEASURED} {command} makes this part."
    plot.write(report_cases.report(), tmp_path / "loss_cpu")
    block = readme.BLOCKS["loss"]()
    assert "| **crpo_kernels, one pass** | 1250 (1238 .. 1275) | 1375 | 96 | 0.80 | 320 |" in block
    assert "| qwen3-8b: T128 V151936 D4096 bfloat16 | 1200 | **crpo_kernels, one pass** |" in block
    assert block.count("| **crpo_kernels, one pass** | 1250 (1238 .. 1275) | 1375") == 1
    assert "(benchmarks/results/loss_cpu.svg)" in block
    assert "not measured" not in block.lower()
    assert readme.gpu_block() == readme.GPU_NOT_MEASURED
    report = report_cases.report("score", is_gpu=True)
    plot.write(report, tmp_path / "score_cuda")
    assert readme.gpu_block().startswith("#### score\n\n`python -m benchmarks score")
    assert "Some GPU, 80.0 GiB, driver 1.2, CUDA 13.0" in readme.gpu_block()


def test_at_a_glance_the_fastest_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.BLOCKS["glance"]() == readme.NOT_MEASURED
    report = report_cases.report()
    plot.write(report, tmp_path / "loss_cpu")
    block = readme.BLOCKS["glance"]()
    assert block.startswith("Loss and all gradients")
    assert block.endswith(readme.GPU_NOT_MEASURED)
    assert "| **crpo_kernels, one pass** | 1250 (1238 .. 1275) | 96 | 320 |" in block
    ran = [row for row in report["cases"][0]["rows"] if "missing" not in row]
    times = [float(cell) for cell in re.findall(r"^\| [^|]+ \| (\d[\d.]*) ?[^|]*\| ", block, re.M)]
    assert len(times) == len(ran)
    assert times == sorted(times)


@pytest.mark.parametrize("page", ["README.md", "benchmarks.md"])
def test_no_gpu_number_without_a_result_file(page: str) -> None:
    text = TEXTS[page]
    if (readme.RESULTS / "gpu_gate.json").exists():
        assert readme.GPU_NOT_MEASURED not in text
        return
    assert readme.GPU_NOT_MEASURED in text
    for name in ("glance", *readme.MEASURED):  # of a CPU
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", "", text, flags=re.DOTALL)
    assert re.findall(r"\d ?ms\b|\b(?:H100|H200|A100|B200|MI300X?)\b", text) == []


def test_a_rehearsal_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {**report_cases.case(), "targets": []}
    found["stands_for"] = found["case"]
    part = {"tables": [found], "checks": [], "not_run": [], "has_failed": False, "error": ""}
    part["seconds"] = 1.0
    report = {**report_cases.report("gpu-gate", is_gpu=True), "parts": {"table": part}}
    report |= {"note": "", "device": "Some GPU"}
    del report["cases"]
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    plot.write(report, tmp_path / "gpu_gate")
    block = readme.gpu_block()
    assert "Some GPU, 80.0 GiB, driver 1.2, CUDA 13.0" in block
    assert "| **crpo_kernels, one pass** | 1250 (1238 .. 1275) | 1375 | 96 | 0.80 | 320 |" in block
    assert "1250 ms, 96 %, 320 MiB" in (tmp_path / "gpu_gate.svg").read_text()
    assert "seconds.warm.median" in (tmp_path / "gpu_gate.csv").read_text()
    plot.write({**report, "note": "rehearsal"}, tmp_path / "gpu_gate")
    assert readme.gpu_block() == readme.GPU_NOT_MEASURED
