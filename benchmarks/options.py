"""The options that `loss` and `score` share, and the cases that they mean."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from crpo_kernels import unsupported_reason

from .losses.cases import DTYPES, SHAPES, Case, named_case
from .output import RESULTS, out_folder, positive, positive_seconds

DEVICES = ("cpu", "cuda")
BACKENDS = ("auto", "torch", "triton")
CPU_ROUNDS, GPU_ROUNDS = 3, 15


def add_case_arguments(parser: argparse.ArgumentParser, seconds: float) -> None:
    """Shapes, inputs, device, what is measured and for how long; ``seconds``: on a CPU."""
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), help="named shapes; else all")
    parser.add_argument("--rows", type=positive, help="rows T: a shape of one's own, or of --shape")
    parser.add_argument("--vocab", type=positive, help="vocabulary V, in the same way")
    parser.add_argument("--dim", type=positive, help="hidden size D, in the same way")
    parser.add_argument(
        "--sizes", nargs="+", type=sizes, help="T,V,D of several shapes of one's own"
    )
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bfloat16"])
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="of ours; else the usual")
    parser.add_argument("--inputs", type=Path, help="transformers folder: values of this model")
    parser.add_argument("--labels", choices=("next", "sampled"), default="next", help="of --inputs")
    parser.add_argument("--only", nargs="+", help="keys of candidates, besides products and naive")
    parser.add_argument("--rounds", type=positive, help="timed, at most")
    parser.add_argument(
        "--seconds",
        type=positive_seconds,
        help=f"in all; what is late is dropped (CPU: {seconds:.0f}, GPU: no limit)",
    )
    parser.add_argument("--threads", type=positive, default=2, help="torch threads (default 2)")
    parser.add_argument("--gate", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--out", type=out_folder, default=RESULTS, help="folder of the files")
    parser.add_argument("--name", type=word, help="added to the names of the result files")


def sizes(text: str) -> tuple[int, int, int]:
    """T,V,D from the command line.

    Raises:
        argparse.ArgumentTypeError: not three whole numbers above 0.
    """
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(
            f"expected T,V,D (rows, vocabulary, hidden size), got {text!r}. Write 2048,151936,1024."
        )
    rows, vocab, dim = map(int, parts)
    return rows, vocab, dim


def word(text: str) -> str:
    """A part of a file's name from the command line.

    Raises:
        argparse.ArgumentTypeError: anything but letters, digits, - and _.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", text):
        raise argparse.ArgumentTypeError(f"expected letters, digits, - or _, got {text!r}.")
    return text


def absent_device(device: str) -> str | None:
    """Why nothing can run on ``--device``, with what to type; None where it can."""
    if device != "cuda" or torch.cuda.is_available():
        return None
    return (
        "--device: expected cpu, got cuda, but torch sees no CUDA device here. "
        "Type --device cpu, or run it on a machine with a GPU."
    )


def refusal(options: argparse.Namespace) -> str | None:
    """Why these options cannot be right, with what to type; None where they can."""
    if reason := absent_device(options.device):
        return reason
    for backend, dtype in product(options.backend or (), options.dtype):
        why = unsupported_reason(backend, options.device, DTYPES[dtype])
        if why is not None:
            return f"--backend: expected one that runs here, got {backend}: {why}. Type auto."
    own = (options.shape, options.rows, options.vocab, options.dim, options.inputs)
    if options.sizes and any(own):
        return (
            "--sizes: expected no --shape, --rows, --vocab, --dim or --inputs beside it, got both. "
            "Leave them away."
        )
    if options.inputs is None:
        return None
    if options.shape or options.vocab or options.dim:
        return (
            "--inputs: expected no --shape, --vocab or --dim beside it, for the model has sizes of "
            "its own, got both. Leave them away; --rows may stay."
        )
    if not (options.inputs / "config.json").is_file():
        return (
            f"--inputs: expected a transformers folder with a config.json, got {options.inputs}. "
            "Name the folder that save_pretrained wrote."
        )
    return None


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The cases that the options mean, but for --inputs."""
    if getattr(options, "sizes", None):  # memory has no such option
        return [
            Case(rows, vocab, dim, DTYPES[dtype], shape=f"T{rows} V{vocab} D{dim}")
            for rows, vocab, dim in options.sizes
            for dtype in options.dtype
        ]
    asked = {"num_rows": options.rows, "vocab_size": options.vocab, "dim": options.dim}
    given = {name: size for name, size in asked.items() if size}
    names = options.shape or (["qwen3-0.6b"] if given else list(SHAPES))
    if given and not options.shape:
        given["shape"] = "own"
    return [
        replace(named_case(name, options.device, DTYPES[dtype]), **given)
        for name in names
        for dtype in options.dtype
    ]


def backends_of(options: argparse.Namespace) -> list[str]:
    """Of ours; the first has the usual keys."""
    return options.backend or ["auto" if options.device == "cuda" else "torch"]


def device_of(options: argparse.Namespace) -> torch.device:
    """The device, with its index."""
    if options.device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(options.device)


def rounds_of(options: argparse.Namespace) -> int:
    """How often candidates are timed at most."""
    return options.rounds or (GPU_ROUNDS if options.device == "cuda" else CPU_ROUNDS)


def seconds_of(options: argparse.Namespace, cpu_seconds: float) -> float:
    """The limit of the command: what was asked for, on a CPU its default, else none."""
    if options.seconds is not None:
        return options.seconds
    return cpu_seconds if options.device == "cpu" else math.inf
