"""Every file of docs/examples runs as its head says, and does what it is an example of."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import children
from crpo_kernels.integrations import verl
from verl_parts import their

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
COMMAND = re.compile(r"((?:python|torchrun) [^\n`]*docs/examples/\w+\.py[^\n`]*)")
OPTIONAL = ("datasets", "deepspeed", "peft", "trl")  # of the extra `integrations`


def command_of(script: Path) -> list[str]:
    """How the head of the file says to run it."""
    found = COMMAND.search(script.read_text("utf-8").split('"""')[1])
    assert found, f"{script.name}: the docstring has no line `python docs/examples/...`"
    words = [word for word in shlex.split(found[1].rstrip(".")) if not word.startswith("[")]
    assert f"docs/examples/{script.name}" in words
    return words


def imported_by(script: Path) -> set[str]:
    return set(re.findall(r"^\s*(?:from|import) (\w+)", script.read_text("utf-8"), re.MULTILINE))


def output_of(script: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What it prints: here when one process runs it, else in processes of its own."""
    for name in OPTIONAL:
        if name in imported_by(script) and importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    words = command_of(script)
    if words[:1] == ["python"] and len(words) == 2:
        printed = io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(script), run_name="__main__")
        return printed.getvalue()
    module = ["-m", "torch.distributed.run"] if words[0] == "torchrun" else []
    done = subprocess.run(
        [sys.executable, *module, *words[1:]], cwd=ROOT, capture_output=True, text=True,
        timeout=240, check=False, env=children.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(value) for value in re.findall(pattern, text)]


def learns_from_rewards(printed: str) -> None:
    rewards = numbers(r"reward (\S+)", printed)
    assert len(rewards) == 40
    assert sum(rewards[:5]) / 5 < 0.25 < 0.5 < sum(rewards[-5:]) / 5


def moves_the_entropy_of_its_stages(printed: str) -> None:
    pairs = re.findall(r"stages: (\S+) (\S+)", printed)
    assert len(pairs) == 60
    gaps = [float(first) - float(second) for first, second in pairs]
    assert sum(gaps[:2]) / 2 < 0.2
    assert sum(gaps[-4:]) / 4 > 0.7, "the second stage commits, the first one does not"


def equals_the_whole_head(printed: str) -> None:
    assert printed.count("gradients equal the whole head's") == 2
    shards = re.findall(r"rank (\d): (\d+) of", printed)  # two processes write: lines may join
    assert sorted(shards) == [("0", "51"), ("1", "50")]


CHECKS = {
    "plain_torch_grpo": learns_from_rewards,
    "hf_trainer_stages": moves_the_entropy_of_its_stages,
    "tensor_parallel_head": equals_the_whole_head,
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_example(script, monkeypatch):
    printed = output_of(script, monkeypatch)
    assert printed.strip(), "an example shows something"
    CHECKS.get(script.stem, str)(printed)


def test_grpo_in_sixty_lines():
    lines = (FOLDER / "plain_torch_grpo.py").read_text("utf-8").splitlines()
    assert len(lines) <= 60


def keys_of(config: dict, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Every leaf of a nested config by its path."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= keys_of(value, (*path, key))
        else:
            found[*path, key] = value
    return found


def verl_config() -> dict:
    return yaml.safe_load((FOLDER / "verl_grpo.yaml").read_text("utf-8"))


def test_verls_config_has_keys_that_verl_knows():
    their("verl.utils.experimental.torch_functional")
    folder = Path(sys.modules["verl"].__path__[0]) / "trainer" / "config"
    known = keys_of(yaml.safe_load((folder / "_generated_ppo_trainer.yaml").read_text("utf-8")))
    ours = keys_of({k: v for k, v in verl_config().items() if k not in ("defaults", "hydra")})
    assert ours.keys() <= known.keys()
    assert (folder / f"{verl_config()['defaults'][0]}.yaml").exists()


def test_what_verls_config_imports_patches_verl():
    functional = their("verl.utils.experimental.torch_functional")
    model = verl_config()["actor_rollout_ref"]["model"]
    assert model["use_fused_kernels"] is True
    assert model["fused_kernel_options"]["impl_backend"] in verl.BACKENDS
    sys.modules.pop(model["external_lib"], None)
    importlib.import_module(model["external_lib"])
    try:
        assert functional.FusedLinearForPPO is verl.FusedLinearForPPO
    finally:
        verl.unpatch()


def test_a_missing_trl_is_refused_with_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "crpo_fast.integrations.trl", raising=False)
    with pytest.raises(ImportError, match=r"trl: expected .*Type pip install 'crpo-fast\["):
        importlib.import_module("crpo_fast.integrations.trl")
