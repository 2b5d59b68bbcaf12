"""docs/kernels.md: its code runs, its sizes are the code's, its numbers those of result files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.__main__ import main
from crpo_kernels import explain_choice, plan

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "kernels.md").read_text("utf-8")


def test_code_of_the_page_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(blocks) == 1
    assert blocks[0].count("assert") == 1
    exec(compile(blocks[0], "docs/kernels.md", "exec"), {})


def test_the_loss_in_ten_lines_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    code = text[text.index("## The loss alone") :].partition("```python\n")[2].partition("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 11  # import torch, and ten
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    hidden, weight, stats = names["hidden"], names["weight"], names["stats"]
    log_p = (hidden @ weight.T).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    picked = log_p.gather(1, names["labels"][:, None])[:, 0]
    torch.testing.assert_close(stats.logprobs, picked.detach())
    policy = (picked - picked.detach()).exp() * stats.token_loss  # on-policy: -A ratio
    loss = (names["token_weights"] * policy + names["entropy_weights"] * entropy).sum()
    torch.testing.assert_close(names["loss"], loss)
    for found, exact in zip(
        (hidden, weight), torch.autograd.grad(loss, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(found.grad, exact, atol=1e-5, rtol=1e-4)


def test_sizes_are_those_of_the_plan() -> None:
    assert f"at most {plan.RING_ROWS} rows" in PAGE
    assert f"{plan.RING_ROWS} rows of V fp32" in PAGE
    assert f"T = 2D + {plan.GROUP_ROWS} rows" in PAGE
    assert f"2D + {plan.GROUP_ROWS} rows of V in bf16 at most" in PAGE
    assert f"{plan.BYTES_OF_VECTORS} bytes a row" in PAGE
    assert f"4VD + {8 * plan.RING_ROWS}V bytes" in PAGE
    assert plan.CPU_WORKSPACE_BYTES == 1 << 30
    room = plan.make_room(
        torch.empty(0, 64, dtype=torch.bfloat16), torch.empty(1, 64).expand(500, 64), 4096,
        backend="triton", workspace_bytes=None, needs_weight_grad=True,
    )  # fmt: skip
    assert room.most_kept == 2 * 64 + plan.GROUP_ROWS
    assert "2048 or 2D rows of V in bf16 at most" in PAGE
    for dim in (64, 2000):
        on_cpu = plan.make_room(
            torch.empty(0, dim, dtype=torch.bfloat16), torch.empty(1, dim).expand(500, dim), 9000,
            backend="torch", workspace_bytes=None, needs_weight_grad=True,
        )  # fmt: skip
        assert on_cpu.ring_rows == max(2048, 2 * dim)
    assert room.ring_rows == plan.RING_ROWS


def test_planned_memory_is_that_of_the_file() -> None:
    file = json.loads((ROOT / "benchmarks" / "results" / "memory_cpu.json").read_text("utf-8"))
    wanted = "T8192 V151936 D1024 bfloat16"
    (case,) = (c for c in file["cases"] if c.get("planned_case", "").startswith(wanted))
    peaks = {row["title"]: row["peak_bytes"] / 2**20 for row in case["planned"]}
    expected = (
        f"one pass {peaks['crpo_kernels, one pass']:.0f} MiB, "
        f"two passes {peaks['crpo_kernels, two passes']:.0f} MiB, "
        f"scoring {peaks['crpo_kernels, scoring']:.1f} MiB, "
        f"plain torch {peaks['plain torch']:.0f} MiB."
    )
    assert f"<!-- planned -->\n{expected}\n<!-- /planned -->" in PAGE


def test_files_and_tests_of_the_table_exist() -> None:
    modules = re.findall(r"`(\w+\.py)`", PAGE)
    assert modules
    assert all((ROOT / "kernels" / "crpo_kernels" / name).exists() for name in modules)
    assert all((ROOT / name).exists() for name in re.findall(r"`(tests/\w+\.py)`", PAGE))


@pytest.mark.parametrize("name", ["one_pass", "scoring"])
def test_diagrams_are_pictures_with_a_title(name: str) -> None:
    assert f"(pictures/{name}.svg)" in PAGE
    tree = ElementTree.parse(ROOT / "docs" / "pictures" / f"{name}.svg").getroot()
    tags = [child.tag.partition("}")[2] for child in tree]
    assert {"title", "desc", "rect", "text", "path"} <= set(tags)


def commands() -> list[str]:
    """What the pages tell to type after `python -m benchmarks`."""
    found = set()
    for name in ("README.md", "docs/kernels.md", "docs/benchmarks.md", "docs/migration.md"):
        text = (ROOT / name).read_text("utf-8")
        found |= {c.strip() for c in re.findall(r"`python -m benchmarks ([^`]+)`", text)}
        found |= {c.strip() for c in re.findall(r"^python -m benchmarks ([^#\n]+)", text, re.M)}
    return sorted(command for command in found if "<" not in command)


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_page_are_known(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([*command.split(), "--help"])
    assert done.value.code == 0
    help_text = capsys.readouterr().out
    assert all(option in help_text for option in re.findall(r"--[\w-]+", command))


def test_one_pass_is_what_a_policy_loss_takes() -> None:
    from crpo_kernels import ObjectiveSpec

    sizes = {"num_rows": 4, "vocab_size": 64, "hidden_size": 8, "is_on_policy": False}
    modes = {
        policy: explain_choice(**sizes, spec=ObjectiveSpec(policy))[0]
        for policy in ("clip", "cispo", "sft", "gspo")
    }
    assert [name for name, why in modes.items() if "mode one_pass" in why] == [
        "clip",
        "cispo",
        "sft",
    ]
