"""Measurements of crpo-fast: `python -m benchmarks <command>`; options alone mean `all`.

Each command is the module of its name (dashes as underscores) with two functions: `add_arguments`
and `run(options, command) -> exit status`. Only the chosen one is imported.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys

COMMANDS = {
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
    "readme": "write the numbers of the result files into README.md",
    "step": "the training phase of one optimizer step, ours and TRL's",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        arguments = ["all", *arguments]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name, help=text) for name, text in COMMANDS.items()}
    if not arguments or arguments[0] not in COMMANDS:
        parser.parse_args(arguments)  # exits with a message, or with the help
    name = arguments[0]
    module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    parsers[name].description = module.__doc__
    parsers[name].formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parsers[name])
    options = parser.parse_args(arguments)
    return module.run(options, shlex.join(["python", "-m", "benchmarks", *arguments]))


if __name__ == "__main__":
    sys.exit(main())
