"""verl: its Triton linear cross entropy with entropy, and its torch one in chunks of rows.

`import verl` starts with Ray and the whole trainer. The two modules that are measured need neither,
so they are imported under packages of verl's names that are empty but for their path.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.losses.baselines import Candidate, Result
from benchmarks.losses.cases import Inputs
from benchmarks.losses.needs import Needs

from .common import policy_result

CHUNK_ROWS = 512  # its default
TORCH_NOTE = f"torch in chunks of {CHUNK_ROWS} rows, d_weight added up in the dtype of the inputs"


def bare_packages() -> None:
    """Make verl and verl.utils without what their `__init__` imports, unless verl is imported."""
    if "verl" in sys.modules:
        return
    found = importlib.util.find_spec("verl")
    if found is None or not found.submodule_search_locations:
        raise ImportError("there is no package verl")
    root = Path(found.submodule_search_locations[0])
    for name, path in (("verl", root), ("verl.utils", root / "utils")):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package


def triton_function() -> Any:
    """Its Triton kernels as one autograd function."""
    bare_packages()
    importlib.import_module("verl.utils.kernel.kernels")
    return importlib.import_module("verl.utils.kernel.linear_cross_entropy").LinearCrossEntropy


def torch_function() -> Any:
    """The autograd function in plain torch."""
    bare_packages()
    return importlib.import_module(
        "verl.utils.experimental.torch_functional"
    ).FusedLinearForPPOFunction


def triton_arguments(inputs: Inputs) -> tuple[Any, ...]:
    """Hidden, weight, labels, temperature, reduction."""
    return (inputs.hidden, inputs.weight, inputs.labels, float(inputs.case.temperature), "none")


def torch_arguments(inputs: Inputs) -> tuple[Any, ...]:
    """Hidden, weight, labels, temperature, rows of a chunk."""
    return (inputs.hidden, inputs.weight, inputs.labels, inputs.case.temperature, CHUNK_ROWS)


def by_triton(inputs: Inputs) -> Result:
    """The Triton kernels and the objective in torch."""
    return policy_result(inputs, *triton_function().apply(*triton_arguments(inputs)))


def by_torch(inputs: Inputs) -> Result:
    """The torch implementation and the objective in torch."""
    return policy_result(inputs, *torch_function().apply(*torch_arguments(inputs)))


def triton_scored(inputs: Inputs) -> Result:
    """The Triton kernels without gradients."""
    with torch.no_grad():
        return Result(None, None, None, *triton_function().apply(*triton_arguments(inputs)))


def torch_scored(inputs: Inputs) -> Result:
    """The torch implementation without gradients."""
    with torch.no_grad():
        return Result(None, None, None, *torch_function().apply(*torch_arguments(inputs)))


def triton_needs() -> Needs:
    """The kernels demand a hidden size of whole tiles."""
    return Needs("verl", triton_function, device="cuda", multiples={"dim": 128})


def losses() -> list[Candidate]:
    """With both gradients."""
    needs = Needs("verl", torch_function)
    return [
        Candidate("verl_triton", "verl Triton", by_triton, needs=triton_needs()),
        Candidate("verl_torch", "verl torch", by_torch, needs=needs, note=TORCH_NOTE),
    ]


def scores() -> list[Candidate]:
    """Without gradients."""
    return [
        Candidate(
            "verl_triton_scored",
            "verl Triton, scoring only",
            triton_scored,
            num_products=1,
            needs=triton_needs(),
        ),
        Candidate(
            "verl_torch_scored",
            "verl torch, scoring only",
            torch_scored,
            num_products=1,
            needs=Needs("verl", torch_function),
            note=f"torch in chunks of {CHUNK_ROWS} rows",
        ),
    ]
