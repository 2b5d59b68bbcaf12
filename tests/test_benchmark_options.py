"""Options that cannot be right are refused before minutes of work, with what to type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.compile_gate import command as compile_gate

MISTAKES = {
    "a folder that cannot be made": (
        ["compile-gate", "--json", "{file}/in/out.json"],
        r"--json: expected a file that can be written, got '.*in/out\.json' \(.*\)\. Name one",
    ),
    "a folder for a file": (
        ["gpu-gate", "--rehearse", "--json", "{folder}"],
        r"--json: expected a file that can be written, got '.*' \(a folder\)\. Name one",
    ),
    "a file for a folder": (
        ["loss", "--out", "{file}"],
        r"--out: expected a folder that can be written to, got '.*file' \(.*\)\. Name one",
    ),
    "no folder can be made for all": (
        ["--device", "cpu", "--out", "{file}/in"],
        r"--out: expected a folder that can be written to, got '.*in' \(.*\)\. Name one",
    ),
    "no threads for all": (["all", "--threads", "0"], r"--threads: .* above 0, got '0'"),
    "no threads": (["growth", "--threads", "-2"], r"--threads: .* above 0, got '-2'"),
    "no time": (["compile-gate", "--timeout", "-1"], r"--timeout: .* above 0, got '-1'\. Write"),
    "no number": (["gpu-gate", "--seconds", "nan"], r"--seconds: .* above 0, got 'nan'\. Write"),
    "V beyond int32": (
        ["roofline", "--shape", "8,2147483648,4"],
        r"--shape: expected V of at most 2147483647 .*, got 2147483648\. Write",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(
    arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as stop:
        main([word.format(file=file, folder=tmp_path) for word in arguments])
    assert stop.value.code == 2
    said = " ".join(capfd.readouterr().err.split())
    assert re.search(message, said), said


def test_memory_names_keys_that_nobody_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--only", "one_pass", "nobody"]) == 2
    assert re.search(
        r"--only: expected keys among one_pass, .*naive.*, got nobody\.", capsys.readouterr().out
    )


@pytest.mark.parametrize("name", ["nowhere", "no_such_module:f", "json:no_such_function"])
def test_launches_that_are_not_there_are_named(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["compile-gate", "--launches", name]) == 2
    assert f"--launches: expected module:function, got '{name}'" in capsys.readouterr().out


def test_launches_that_import_what_is_not_there_are_no_mistake_of_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lists_launches.py").write_text("import no_such_dependency\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        compile_gate.listed_jobs("lists_launches:f")


@pytest.mark.parametrize(("version", "said"), [(None, "none"), ("3.2.0", "3.2.0")])
def test_the_compile_gate_needs_triton(
    version: str | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compile_gate, "triton_version", lambda: version)
    assert main(["compile-gate"]) == 2
    expected = f"triton: expected 3.6 or newer, got {said}. Type pip install 'triton>=3.6'."
    assert expected in capsys.readouterr().out
