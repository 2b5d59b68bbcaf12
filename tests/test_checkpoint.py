"""Checkpoints that are torn, changed or crafted are named and skipped; nothing in them runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crpo_fast import checkpoint, checkpoint_files, train
from crpo_fast.checkpoint_files import MODEL, OPTIMIZER, STATE

TINY = str(Path(__file__).with_name("tiny.toml"))
CAPPED = ("--train.max_steps", "2", "--checkpoint.keep", "9")


def run(run_dir: Path, *arguments: str) -> int:
    return train.main([TINY, "--run.dir", str(run_dir), "--train.threads", "1", *arguments])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 1 to 4 of two phases of two steps."""
    run_dir = tmp_path_factory.mktemp("whole") / "r"
    assert run(run_dir, *CAPPED) == 0
    return run_dir


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    """The run as it was before its end, to go on with."""
    copy = tmp_path / "r"
    shutil.copytree(whole, copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "final")
    return copy


@pytest.fixture
def last(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step_4"


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(bytes(data))


def seal(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda state: None) -> None:
    """Make the checksums fit again after ``change``, as somebody who crafts a checkpoint would."""
    state = json.loads((folder / STATE).read_text())
    for name in (MODEL, OPTIMIZER):
        file = folder / name
        state["files"][name] = {
            "bytes": file.stat().st_size,
            "sha256": checkpoint_files._digest_of(file),
        }
    change(state)
    body = {k: v for k, v in state.items() if k != "sha256"}
    (folder / STATE).write_text(json.dumps({**body, "sha256": checkpoint_files._seal(body)}))


def cut(name: str) -> Callable[[Path], None]:
    return lambda p: os.truncate(p / name, (p / name).stat().st_size // 2)


def flipped(name: str, offset: int) -> Callable[[Path], None]:
    return lambda p: flip(p / name, offset)


def digit(p: Path) -> None:
    file = p / STATE
    file.write_text(file.read_text().replace('"phase_steps": 2', '"phase_steps": 1'))


ACCIDENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no state": (lambda p: (p / STATE).unlink(), "state.json is missing"),
    "no model": (lambda p: (p / MODEL).unlink(), "model.safetensors is missing"),
    "no optimizer": (lambda p: (p / OPTIMIZER).unlink(), "optimizer.safetensors is missing"),
    "half a model": (cut(MODEL), "model.safetensors: expected"),
    "half an optimizer": (cut(OPTIMIZER), "optimizer.safetensors: expected"),
    "half a state": (cut(STATE), "state.json is no JSON"),
    "empty state": (lambda p: (p / STATE).write_text(""), "state.json is no JSON"),
    "zeros": (lambda p: (p / STATE).write_bytes(bytes(4096)), "state.json is no JSON"),
    "bit of a weight": (flipped(MODEL, -1), "model.safetensors: the checksum differs"),
    "bit of a header": (flipped(MODEL, 9), "model.safetensors: the checksum differs"),
    "bit of a moment": (flipped(OPTIMIZER, -1), "optimizer.safetensors: the checksum differs"),
    "digit": (digit, "state.json: the checksum of its own content differs"),
    "list": (lambda p: (p / STATE).write_text("[1]"), "expected an object with a format"),
    "renamed": (lambda p: seal(p, lambda s: s["progress"].update(step=3)), "is of step 3"),
}


@pytest.mark.parametrize("name", ACCIDENTS)
def test_what_is_not_whole_is_named_once_and_skipped(
    last: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, why = ACCIDENTS[name]
    damage(last)
    found = next(checkpoint.find(last.parent))
    assert found[0].name == "step_3"
    assert found[1].step == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"skipping {last}: not a whole checkpoint (")
    assert why in line


def test_a_run_goes_on_from_the_one_before(
    last: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the same weights, with one line; asked for by name the damaged one is refused."""
    flip(last / OPTIMIZER, -1)
    run_dir = last.parent.parent
    before = sorted(p.name for p in run_dir.iterdir())
    assert run(run_dir, *CAPPED, "--run.resume", str(last)) == 2
    error = capsys.readouterr().err
    assert f"error: {last}: not a whole checkpoint (optimizer.safetensors" in error
    assert "Type --run.resume auto" in error
    assert sorted(p.name for p in run_dir.iterdir()) == before
    assert run(run_dir, *CAPPED) == 0
    out = capsys.readouterr().out
    assert out.count("not a whole checkpoint") == 1
    assert "resumed from" in out
    assert "step_3 (step 3)" in out
    for name in (MODEL, OPTIMIZER):
        original = whole / "checkpoints" / "step_4" / name
        assert (last / name).read_bytes() == original.read_bytes()


def test_a_whole_one_whose_kl_reference_is_torn_is_skipped(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resumed phase must not take other weights for the ones it began with."""
    cut(MODEL)(run_dir / "checkpoints" / "step_2")
    assert run(run_dir, *CAPPED) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("skipping")]
    assert [x.split(":")[0].split("/")[-1] for x in lines] == ["step_4", "step_3", "step_2"]
    assert "no KL reference, the end of phase 1: step_2: model.safetensors: expected" in lines[0]


class Payload:
    """Unpickling this leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


def header(file: Path, text: bytes, size: int | None = None, body: bytes = b"") -> None:
    file.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + body)


def tensor(name: str, dtype: str, shape: list[int], offsets: list[int]) -> bytes:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


def renamed(p: Path, file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(p / file)
    change(tensors)
    save_file(tensors, p / file)


HUGE = 2**63 - 1
CRAFTED: dict[str, Callable[[Path], Any]] = {
    "header of 8 EiB": lambda p: header(p / MODEL, b"{}", HUGE),
    "header longer than the file": lambda p: header(p / MODEL, b"{}", 10**6),
    "huge tensor": lambda p: header(
        p / MODEL, tensor("w", "F32", [HUGE, HUGE], [0, 4]), None, b"1234"
    ),
    "offsets outside": lambda p: header(p / MODEL, tensor("w", "F32", [1], [0, 1 << 40])),
    "unknown type": lambda p: header(p / MODEL, tensor("w", "OBJECT", [1], [0, 4]), None, b"1234"),
    "no header": lambda p: (p / MODEL).write_bytes(b""),
    "names without a kind": lambda p: renamed(
        p, OPTIMIZER, lambda t: t.update({"../../../etc/passwd": torch.ones(1)})
    ),
    "names with code": lambda p: renamed(
        p, OPTIMIZER, lambda t: t.update({"w|__import__('os')": torch.ones(1)})
    ),
}
STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": lambda s: s.update(format="3\x1b[2J\nOK"),
    "files elsewhere": lambda s: s.update(files={"../../config.toml": {}, OPTIMIZER: {}}),
    "size as text": lambda s: s["files"][MODEL].update(bytes="many"),
    "no progress": lambda s: s.update(progress=None),
    "negative step": lambda s: s["progress"].update(step=-1),
    "huge step": lambda s: s["progress"].update(step=10**30),
    "step as text": lambda s: s["progress"].update(step="4"),
    "step as bool": lambda s: s["progress"].update(step=True),
    "phase far away": lambda s: s["progress"].update(phase=10**11),
    "caps as text": lambda s: s["progress"].update(caps="22"),
    "caps that do not fit": lambda s: s["progress"].update(caps=[2, 1]),
    "unknown key": lambda s: s["progress"].update(__class__="os"),
    "endless seconds": lambda s: s["progress"].update(seconds=float("inf")),
    "best as a list": lambda s: s["progress"].update(best=[1, 2, 3]),
    "rewards of three": lambda s: s["progress"].update(rewards=[1, 2, 3]),
    "logged as a list": lambda s: s["progress"].update(logged=[1]),
    "endless log": lambda s: s["progress"]["logged"].update({"metrics.jsonl": 10**30}),
    "groups as text": lambda s: s.update(param_groups="lambda: 0"),
    "learning rate as code": lambda s: s["param_groups"][0].update(lr="exec('1')"),
    "params as numbers": lambda s: s["param_groups"][0].update(params=[0, 1]),
}


def skips(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert next(checkpoint.find(folder.parent))[0].name == "step_3"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"skipping {folder}: not a whole checkpoint (")
    assert line.isprintable()
    assert len(line) < 600
    return line


def test_a_crafted_checkpoint_runs_nothing(
    last: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pickle in place of each file, with checksums that fit where there are any."""
    marker = tmp_path / "pwned"
    payload = pickle.dumps(Payload(marker))
    saved = {name: (last / name).read_bytes() for name in (MODEL, OPTIMIZER, STATE)}
    for name in saved:
        (last / name).write_bytes(payload)
        if name != STATE:
            seal(last)
        skips(last, capsys)
        torch.save({"a": Payload(marker)}, last / name)
        if name != STATE:
            seal(last)
        skips(last, capsys)
        for n, content in saved.items():
            (last / n).write_bytes(content)
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists()  # the payload works where somebody unpickles it


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_tensor_files_are_skipped(
    last: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    CRAFTED[name](last)
    seal(last)
    skips(last, capsys)


@pytest.mark.parametrize("name", STATES)
def test_crafted_states_are_skipped(
    last: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seal(last, STATES[name])
    skips(last, capsys)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"format": ' + "9" * 10_000 + "}",
        '{"format": NaN}',
        "\ud800",
        "[" + "0," * 10,
    ],
    ids=["deep", "long number", "nan", "surrogate", "half"],
)
def test_crafted_json_is_skipped(last: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (last / STATE).write_bytes(text.encode("utf-8", "surrogatepass"))
    skips(last, capsys)


def test_files_that_would_never_end_are_not_opened(
    last: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (last / STATE).unlink()
    os.mkfifo(last / STATE)
    assert "state.json is missing" in skips(last, capsys)
    (last / STATE).unlink()
    (last / STATE).symlink_to("/dev/zero")
    assert "state.json is missing" in skips(last, capsys)


def test_a_state_of_another_model_is_refused_with_its_name(
    last: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed(last, MODEL, lambda t: t.update({"__init__": torch.ones(1)}))
    seal(last)
    assert run(last.parent.parent, *CAPPED) == 2
    error = capsys.readouterr().err
    assert f"{last}: not a whole checkpoint (model.safetensors is of another model" in error
    assert "'__init__' is not in the model" in error


@pytest.mark.parametrize(
    "controllers", [{"alarm": 5}, {"alarm": {"names": [1]}}, {"nonfinite": "os.system"}]
)
def test_crafted_controllers_are_refused(
    last: Path, controllers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    seal(last, lambda s: s["progress"].update(controllers=controllers))
    assert run(last.parent.parent, *CAPPED) == 2
    assert f"{last}: not a whole checkpoint (state.json: controllers:" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../../etc", "/etc", "step_4/../../..", "step_99x", ""])
def test_the_names_in_latest_and_best_lead_nowhere(
    run_dir: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_dir / "checkpoints"
    (folder / "latest").write_text(name)  # for people; nothing reads it
    assert next(checkpoint.find(folder))[0].name == "step_4"
    (folder / "best").write_text(name)
    assert checkpoint.best_path(folder) is None
    assert run(run_dir, *CAPPED, "--run.resume", "best") == 2
    assert "expected a best checkpoint, got none" in capsys.readouterr().err
