"""docs/migration.md: before and after are run and compared; what it calls exact is measured."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from verl_parts import their

PAGE = (Path(__file__).parent.parent / "docs" / "migration.md").read_text("utf-8")
B, L, D, V = 4, 6, 16, 40
NEEDS = {"liger_kernel": "liger-kernel", "trl": "trl"}  # import name -> distribution
BLOCK = re.compile(r"^## (.+?)$|^```python\n# (before|after)\n(.*?)^```$", re.M | re.S)


def pairs() -> dict[str, dict[str, str]]:
    """Section -> its two blocks."""
    found: dict[str, dict[str, str]] = {}
    section = ""
    for match in BLOCK.finditer(PAGE):
        if match[1]:
            section = match[1]
        else:
            found.setdefault(section, {})[match[2]] = match[3]
    return found


PAIRS = pairs()


def need(code: str) -> None:
    for module, name in NEEDS.items():
        if f"from {module}" in code and importlib.util.find_spec(module) is None:
            pytest.skip(f"{name} is not installed")
    if "from verl" in code:
        their("verl.utils.experimental.torch_functional")


def world(seed: int, dtype: torch.dtype = torch.float32, sequences: int = B) -> dict[str, Any]:
    """What the blocks use; the last sequence is shorter."""
    make = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    mask = torch.ones(sequences, L, dtype=torch.long)
    mask[-1, 3:] = 0
    hidden = randn(sequences, L, D).to(dtype).requires_grad_()
    token_ids = torch.randint(V, (sequences, L), generator=make)
    return {
        "torch": torch, "hidden": hidden, "rows": hidden.flatten(0, 1), "mask": mask,
        "weight": (0.7 * randn(V, D)).to(dtype).requires_grad_(), "bias": randn(V).to(dtype),
        "token_ids": token_ids, "labels": token_ids.flatten(), "advantages": randn(sequences),
        "old": randn(sequences, L) / 5 - 4, "ref": randn(sequences, L) / 5 - 4,
    }  # fmt: skip


def run(code: str, names: dict[str, Any]) -> dict[str, Tensor]:
    """The results of a block and the gradients of hidden and weight."""
    exec(compile(code, "docs/migration.md", "exec"), names)
    found = {key: names[key] for key in ("loss", "nll", "logprobs", "entropy") if key in names}
    upstream = torch.linspace(0.5, 1.5, names["labels"].numel())
    total = sum((x if x.dim() == 0 else (x * upstream).sum()) for x in found.values())
    names["hidden"].grad = names["weight"].grad = None
    total.backward()
    gradients = {"d_hidden": names["hidden"].grad, "d_weight": names["weight"].grad}
    return {name: x.detach().clone() for name, x in {**found, **gradients}.items()}


def check_equal(before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need(before)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: function)  # minutes, else
        theirs = run(before, world(0))
    ours = run(after, world(0))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        largest = float(value.abs().max())
        assert largest > 1e-3
        torch.testing.assert_close(
            ours[name], value.view_as(ours[name]), rtol=0, atol=1e-5 * largest, msg=name
        )


def test_every_section_has_its_pair() -> None:
    assert {len(blocks) for blocks in PAIRS.values()} == {2}
    assert [name.split(":")[0] for name in PAIRS] == ["Liger", "Liger", "TRL", "verl"]


@pytest.mark.parametrize("section", PAIRS)
def test_before_and_after_are_equal(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_equal(PAIRS[section]["before"], PAIRS[section]["after"], monkeypatch)


AGGREGATION = 'aggregation="sequence_mean"'
SPEC = "ObjectiveSpec(clip_low=0.2, clip_high=0.28, kl_coef=0.04)"
ROWS = {  # rows of the table: what changes before, and after
    "bnpo": ({'"grpo"': '"bnpo"'}, {AGGREGATION: 'aggregation="token_mean"'}),
    "dapo": ({'"grpo"': '"dapo"'}, {AGGREGATION: 'aggregation="token_mean"'}),
    "dapo, counted": (
        {'"grpo"': '"dapo"', "=old)": "=old, num_items_in_batch=50)"},
        {AGGREGATION: 'aggregation="token_mean", num_tokens=50'},
    ),
    "dr_grpo": (
        {'"grpo"': '"dr_grpo", max_completion_length=9'},
        {AGGREGATION: 'aggregation="constant", max_length=9'},
    ),
    "cispo": (
        {'"grpo"': '"cispo"', "epsilon_high=0.28": "epsilon_high=5.0"},
        {
            AGGREGATION: 'aggregation="token_mean"',
            SPEC: 'ObjectiveSpec.preset("cispo", clip_high=4.0, kl_coef=0.04)',
        },
    ),
    "sequence": (
        {'"grpo"': '"grpo", importance_sampling_level="sequence"'},
        {
            SPEC: 'ObjectiveSpec.preset("gspo", clip_low=0.2, clip_high=0.28, kl_coef=0.04)',
        },
    ),
    "no reference": (
        {"beta=0.04": "beta=0.0, use_ref_model=False", "ref_per_token_logps=ref, ": ""},
        {", kl_coef=0.04": "", "ref_logprobs=ref, ": ""},
    ),
    "on-policy": ({", old_per_token_logps=old": ""}, {"old_logprobs=old, ": ""}),
    "vllm_is_ratio": (
        {"=old)": "=old, vllm_is_ratio=mask[:, :1] * 0.7)"},
        {"advantages[:, None]": "(0.7 * advantages[:, None])"},
    ),
}


ON_POLICY = tuple(
    {**first, **second}
    for first, second in zip(ROWS["no reference"], ROWS["on-policy"], strict=True)
)


def changed(section: str, *changes: dict[str, str]) -> list[str]:
    """The two blocks of a section with words exchanged."""
    codes = [PAIRS[section][side] for side in ("before", "after")]
    for side, words in enumerate(changes):
        for old, new in words.items():
            assert old in codes[side]
            codes[side] = codes[side].replace(old, new)
    return codes


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_ligers_table(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_equal(*changed("Liger: the GRPO loss", *ROWS[row]), monkeypatch)


def errors_in_bf16(section: str, monkeypatch: pytest.MonkeyPatch, sequences: int = 256) -> dict:
    """Name -> relative error before and after, in bf16 on-policy, against fp64."""
    before, after = changed(section, *(ON_POLICY if "GRPO" in section else ({}, {})))
    need(before)
    exact = world(0, torch.bfloat16, sequences)
    for name in ("hidden", "weight"):
        exact[name] = exact[name].detach().double().requires_grad_()
    exact["rows"] = exact["hidden"].flatten(0, 1)
    truth = run(after, exact)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found = [run(code, world(0, torch.bfloat16, sequences)) for code in (before, after)]

    def error(values: dict[str, Tensor], name: str) -> float:
        right = truth[name].double()
        return float((values[name].double().view_as(right) - right).norm() / right.norm())

    return {name: [error(values, name) for values in found] for name in truth}


def numbers_of(row: str) -> list[float]:
    """Before and after of a row of the page's table of errors."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {row}"))
    return [float(cell) for cell in line.split("|")[2:4]]


def on_page(values: list[float]) -> list[str]:
    return [f"{value:.1e}".replace("e-0", "e-") for value in values]


@pytest.mark.parametrize(
    ("section", "row", "gain"),
    [("Liger: the GRPO loss", "Liger's GRPO", 3.0), ("verl", "verl", 1.2)],
)
def test_d_weight_in_bf16(
    section: str, row: str, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = errors_in_bf16(section, monkeypatch)["d_weight"]
    print(section, *on_page([before, after]))
    assert after * gain < before
    assert numbers_of(f"gradient of the head, {row}") == pytest.approx([before, after], rel=0.3)


@pytest.mark.parametrize("section", ["Liger: scaled cross entropy", "verl"])
def test_entropy_in_bf16(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = errors_in_bf16(section, monkeypatch)["entropy"]
    print(section, *on_page([before, after]))
    assert after * 1.3 < before
    assert numbers_of("entropy, ") == pytest.approx([before, after], rel=0.3)


def test_the_error_of_ligers_sum_grows_with_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (errors_in_bf16("Liger: the GRPO loss", monkeypatch, n) for n in (64, 512))
    print(*(on_page(found["d_weight"]) for found in (few, many)))
    assert many["d_weight"][0] > 1.5 * few["d_weight"][0]
    assert many["d_weight"][1] < 1.5 * few["d_weight"][1]
