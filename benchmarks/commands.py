"""The commands of `python -m benchmarks`, and the modules that run them.

Such a module has two functions: `add_arguments` and `run(options, command) -> exit status`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

COMMANDS = {  # name -> what it does
    "all": "loss, score, memory, growth, rollout and step for one device in ten minutes",
    "compile-gate": "compile every Triton kernel for GPUs that are not here; 1 when one fails",
    "gpu-gate": "correctness, memory and the targets' table on one GPU; --rehearse on a CPU",
    "growth": "time and memory against sizes, settings and ranks, with fitted exponents",
    "loss": "the fused loss beside its floor and its peers",
    "memory": "peak bytes of every candidate by shape, against the bound of the design",
    "plot": "draw .md, .svg and .csv of result files again",
    "quickstart": "the main job over seeds beside its rivals",
    "record": "keep the result of a finished run",
    "roofline": "the cost model: operations, bytes and floor of each step",
    "rollout": "tokens per second of the rollout engines beside transformers' generate",
    "score": "logprobs and entropies without gradients beside their floor and peers",
    "readme": "write the numbers of the result files into README.md and docs/",
    "step": "the training phase of one optimizer step, ours and TRL's",
}
MODULES = {
    "all": "all",
    "compile-gate": "compile_gate.command",
    "gpu-gate": "gpu_gate.command",
    "growth": "growth.command",
    "loss": "losses.loss",
    "memory": "memory.command",
    "plot": "plot",
    "quickstart": "quickstart.command",
    "record": "record",
    "roofline": "roofline",
    "rollout": "rollout.command",
    "score": "losses.score",
    "readme": "readme",
    "step": "step.command",
}


def command_module(name: str) -> ModuleType:
    """The module of a command; only the chosen one is imported."""
    return importlib.import_module(f".{MODULES[name]}", __package__)
