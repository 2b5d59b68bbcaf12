"""Options that cannot be right are refused before minutes of work, with what to type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.__main__ import main

MISTAKES = {
    "a folder that cannot be made": (
        ["compile-gate", "--json", "{file}/in/out.json"],
        r"--json: expected a file that can be written, got '.*in/out\.json' \(.*\)\. Name one",
    ),
    "a folder for a file": (
        ["gpu-gate", "--rehearse", "--json", "{folder}"],
        r"--json: expected a file that can be written, got '.*' \(a folder\)\. Name one",
    ),
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


@pytest.mark.parametrize("name", ["nowhere", "no_such_module:f", "json:no_such_function"])
def test_launches_that_are_not_there_are_named(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["compile-gate", "--launches", name]) == 2
    assert f"--launches: expected module:function, got '{name}'" in capsys.readouterr().out
