"""A run that goes on at another number of ranks: the same state, and the same end to 1e-6.

The cold start sees the same sequences at any number of ranks, and so do rollouts of the engine
``static``, whose random numbers belong to the prompt. In fp32 Adam turns the rounding of gradients
near 0 into updates, so a run with rewards is compared in fp64.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import children
from crpo_fast import train

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
STEPS, HALF = 8, 4
FLAT = ("--optim.schedule", "constant", "--optim.lr", "1e-3", "--checkpoint.keep", "99")


def config(tmp_path: Path, dtype: str, algorithm: str = "sft") -> str:
    """tiny.toml with one phase; rewards are lengths, so that the samples of a group differ."""
    text = (HERE / "tiny.toml").read_text().split("[[phases]]")
    assert 'compute_dtype = "float32"' in text[0]
    file = tmp_path / f"{algorithm}.toml"
    phase = {"sft": text[1], "crpo": text[2]}[algorithm].replace("steps = 4", f"steps = {STEPS}")
    head = text[0].replace("float32", dtype)
    head = head.replace("[rewards]", "[rewards]\nfunctions = ['faulty_rewards:length']")
    file.write_text("[[phases]]".join([head, phase]))
    return str(file)


def at_two_ranks(*command: str) -> None:
    done = subprocess.run(
        [*LAUNCH, *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=children.environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]


def run(ranks: int, path: str, run_dir: Path, *options: str) -> None:
    arguments = [path, "--run.dir", str(run_dir), "--train.threads", "1", *FLAT, *options]
    if ranks == 1:
        assert train.main(arguments) == 0
    else:
        at_two_ranks(str(ROOT / "crpo_fast" / "train.py"), *arguments)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("before", "after", "dtype", "algorithm"),
    [(1, 2, "float64", "crpo"), (2, 1, "float32", "sft")],
)
def test_another_number_of_ranks_ends_within_1e_6(
    tmp_path: Path, before: int, after: int, dtype: str, algorithm: str
) -> None:
    """Half of the run at ``before`` ranks; from there to the end at ``before`` and ``after``."""
    path = config(tmp_path, dtype, algorithm)
    run(before, path, tmp_path / "same", "--train.max_steps", str(HALF))
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    run(before, path, tmp_path / "same")
    run(after, path, tmp_path / "other")
    ends = [weights(tmp_path / name / "final") for name in ("same", "other")]
    middle = weights(tmp_path / "same" / "checkpoints" / f"step_{HALF}")
    for name, value in ends[0].items():
        scale = float(value.abs().max())
        assert float((ends[1][name] - value).abs().max()) <= 1e-6 * scale, name
        assert float((middle[name] - value).abs().max()) > 1e-3 * scale, name  # it did go on


@pytest.mark.multirank
def test_the_state_that_two_ranks_load_is_that_of_the_file(tmp_path: Path) -> None:
    """Saved by one rank, loaded and saved by two: the same bytes."""
    path = config(tmp_path, "float32")
    run(1, path, tmp_path / "r", "--train.max_steps", "1")
    source = tmp_path / "r" / "checkpoints" / "step_1"
    where = (path, str(tmp_path / "r"), str(source), str(tmp_path / "copy"))
    at_two_ranks(str(HERE / "reload_worker.py"), *where)
    for name in ("model.safetensors", "optimizer.safetensors"):
        loaded = [load_file(p / name) for p in (source, tmp_path / "copy" / "step_1")]
        assert loaded[0].keys() == loaded[1].keys()
        assert all(torch.equal(loaded[1][key], value) for key, value in loaded[0].items()), name
