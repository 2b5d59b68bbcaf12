"""Does it fit? Parameters and bytes per rank of a run, before anything is loaded or started.

    python -m crpo_fast.plan <config.toml> [--section.key value ...] [--ranks N] [--gpu-mem 80GB]

A step is rehearsed on fake tensors (plan_moments.py): no weights, no GPU, no torchrun, and of the
model no more than its config.json. Exit status: 0 it fits (or no limit was given), 1 it does not, 2
the user must correct something.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crpo_fast import distributed
from crpo_fast.config import Config, ConfigError, parse_arguments
from crpo_fast.console import Reporter
from crpo_fast.live_bytes import LABELS
from crpo_fast.models import ModelError
from crpo_fast.plan_model import model_maker, parameters_by_part
from crpo_fast.plan_moments import Lengths, Moment, Rehearsal, planned_backend
from crpo_fast.session import check_ranks
from crpo_kernels import BackendChoice

_UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20, "TB": 10**12, "TIB": 2**40}
_NOTE = (
    "Tensor bytes of the largest rank, every sequence at its limit. The CUDA context and what the "
    "allocator cannot use come on top: leave a tenth of a GPU."
)


@dataclass(frozen=True)
class PhasePlan:
    """One phase: what a rank works on, and its moments."""

    index: int
    algorithm: str
    sequences: int
    micro_batches: int
    tokens: int  # of the largest micro-batch, padding included
    moments: list[Moment]


@dataclass(frozen=True)
class Plan:
    """All that is said about a run; bytes are of one rank.

    Attributes:
        loss: the backend of the loss, and why it is that one.
        parameters: all, trainable, and by part of the model.
        phases: the moments of each phase.
        cpu: bytes of CPU memory, by what needs them (beside the ranks' own on a CPU).
        limit: of ``--gpu-mem``, bytes, or None.
    """

    config: Config
    ranks: int
    device: str
    lengths: Lengths
    loss: BackendChoice
    parameters: dict[str, int]
    phases: list[PhasePlan]
    cpu: dict[str, int]
    limit: int | None

    @property
    def peak(self) -> tuple[PhasePlan, Moment]:
        """The phase and the moment that need most."""
        pairs = [(phase, moment) for phase in self.phases for moment in phase.moments]
        return max(pairs, key=lambda pair: pair[1].total)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.limit is None or self.peak[1].total <= self.limit

    def parts(self) -> dict[str, int]:
        """The most bytes of each part, whenever that is."""
        moments = [moment for phase in self.phases for moment in phase.moments]
        return {name: max(m.most.get(name, 0) for m in moments) for name in LABELS}

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        phase, moment = self.peak
        return {
            "model": self.config.model.path or "built from model.build",
            "ranks": self.ranks,
            "device": self.device,
            "lengths": dataclasses.asdict(self.lengths),
            "loss_backend": self.loss.name,
            "parameters": self.parameters,
            "phases": [
                {
                    **dataclasses.asdict(p),
                    "moments": [{**dataclasses.asdict(m), "total": m.total} for m in p.moments],
                }
                for p in self.phases
            ],
            "bytes_per_rank": self.parts(),
            "cpu_bytes": self.cpu,
            "peak": {"bytes": moment.total, "phase": phase.index, "moment": moment.name},
            "gpu_mem": self.limit,
            "fits": self.fits,
        }


def plan(
    config: Config,
    *,
    ranks: int = 1,
    device: str = "cpu",
    prompt_tokens: int = 0,
    completion_tokens: int = 0,
    limit: int | None = None,
) -> Plan:
    """Rehearse every phase of a run.

    Args:
        config: of the run.
        ranks: of all machines together.
        device: "cpu" or "cuda"; on a GPU the loss has the backend triton and fp32 logits,
            checkpoints are gathered in CPU memory, and the engine hf sizes its cache by what is
            free.
        prompt_tokens: of every prompt; 0: the limit of the config.
        completion_tokens: of every completion; 0: the limit of the config.
        limit: bytes of one GPU, for ``Plan.fits``.

    Raises:
        ConfigError, ModelError: what to type.
    """
    if ranks < 1:
        raise ConfigError(f"--ranks: expected at least 1, got {ranks}. Type --ranks 8.")
    check_ranks(config, ranks)
    lengths = Lengths(
        prompt_tokens or config.data.max_prompt_tokens,
        completion_tokens or config.rollout.max_tokens,
    )
    make_model, loss = model_maker(config, device), planned_backend(config, device)
    phases: list[PhasePlan] = []
    parameters: dict[str, int] = {}
    for index, phase in enumerate(config.phases):
        with distributed.pretended(ranks) as world:
            rehearsal = Rehearsal(config, make_model, world, phase, lengths, device=device)
            moments = [*rehearsal.start(is_first=index == 0), *rehearsal.moments(limit)]
            parameters = parameters_by_part(rehearsal.policy.model)
            count, tokens = rehearsal.micro_batches
            sequences = len(rehearsal.sequences())
            phases.append(PhasePlan(index + 1, phase.algorithm, sequences, count, tokens, moments))
    master = 8 if config.model.compute_dtype == "float64" else 4
    cpu = {
        "loading, each rank": master * parameters["all"],
        "saving, rank 0": master * (parameters["all"] + 2 * parameters["trainable"]),
    }
    return Plan(config, ranks, device, lengths, loss, parameters, phases, cpu, limit)


def parse_bytes(text: str) -> int:
    """``80GB`` (10^9), ``80GiB`` (2^30), also MB, MiB, TB, TiB.

    Raises:
        ConfigError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)\s*", text)
    if not match or match[2].upper() not in _UNITS or not float(match[1]):
        raise ConfigError(
            f"--gpu-mem: expected a size with its unit, got {text!r}. Type --gpu-mem 80GB or "
            "--gpu-mem 80GiB."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            value = count / scale
            return f"{value:,.{2 if value < 10 else 1}f} {unit}"
    return f"{count} B"


def _number(count: int) -> str:
    for unit, scale in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return str(count)


def show(found: Plan, reporter: Reporter) -> None:
    """Print a plan."""
    config, parameters = found.config, dict(found.parameters)
    total, trainable = parameters.pop("all"), parameters.pop("trainable")
    reporter.line(f"model: {config.model.path or 'built from model.build'}")
    reporter.line(
        f"parameters: {_number(total)} in all, {_number(trainable)} trainable: "
        + ", ".join(f"{name} {_number(count)}" for name, count in parameters.items())
    )
    reporter.line(
        f"{found.ranks} rank(s) on {found.device}, {config.model.compute_dtype} compute, "
        f"prompts of {found.lengths.prompt} tokens, completions of {found.lengths.completion}"
    )
    reporter.line(f"loss: backend {found.loss.name} ({found.loss.reason})")
    for phase in found.phases:
        names = [n for n in LABELS if any(n in m.most for m in phase.moments)]
        most = {n: _size(max(m.most.get(n, 0) for m in phase.moments)) for n in names}
        reporter.line()
        reporter.table(
            f"phase {phase.index}, {phase.algorithm}: {phase.sequences} sequences a rank in "
            f"{phase.micro_batches} micro-batch(es) of up to {phase.tokens:,} tokens; bytes of one "
            "rank at the peak of each moment",
            ["", *(m.name for m in phase.moments), "at most"],
            [
                *([n, *(_size(m.parts.get(n, 0)) for m in phase.moments), most[n]] for n in names),
                ["all", *(_size(m.total) for m in phase.moments), ""],
            ],
        )
    reporter.line()
    for name, count in found.cpu.items():
        reporter.line(f"CPU memory while {name}: {_size(count)}")
    reporter.line(_NOTE)


def verdict(found: Plan) -> str:
    """One line: the peak, and whether it fits."""
    phase, moment = found.peak
    text = f"peak: {_size(moment.total)} a rank (phase {phase.index}, {moment.name})"
    if found.limit is None:
        return text
    share = f"{100 * moment.total / found.limit:.0f} % of {_size(found.limit)}"
    if found.fits:
        return f"{text}: fits, {share}"
    return f"{text}: does not fit, {share}"


def changes(found: Plan) -> list[str]:
    """What to type to need less at the peak, the most effective part first."""
    config, (phase, moment) = found.config, found.peak
    longest = found.lengths.prompt + found.lengths.completion
    smaller = max(longest, config.train.token_budget // 2)
    offers = {
        "activations": (
            ["--model.activation_checkpointing"]
            if not config.model.activation_checkpointing
            else [f"--train.token_budget {smaller}"]
            if smaller < min(config.train.token_budget, phase.tokens)
            else ["a smaller --data.max_prompt_tokens or --rollout.max_tokens"]
        ),
        "loss workspace": ["--train.workspace_mib 256"],
        "gradients, not reduced": [f"--ranks {2 * found.ranks} (shorter accumulation)"]
        if phase.micro_batches > 1
        else [],
        "KL reference": ["--objective.kl_coef 0"],
        "rollouts": [
            "a smaller --rollout.max_tokens or --rollout.prompts_per_step, or more --ranks"
        ],
    }
    sharded = ("weights, sharded", "gradients, sharded", "optimizer")
    offers |= {name: [f"--ranks {2 * found.ranks}"] for name in sharded}
    ordered = sorted(moment.parts, key=lambda name: -moment.parts[name])
    return list(dict.fromkeys(text for name in ordered for text in offers.get(name, [])))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m crpo_fast.plan",
        allow_abbrev=False,
        description="Parameters and bytes per rank of a run, and whether they fit.",
        epilog="The first argument is the config; every --section.key of it is a flag, too.",
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--gpu-mem", default="", help="of one GPU: 80GB or 80GiB")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=0, help="0: data.max_prompt_tokens")
    parser.add_argument("--completion-tokens", type=int, default=0, help="0: rollout.max_tokens")
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    try:
        limit = parse_bytes(options.gpu_mem) if options.gpu_mem else None
        device = options.device
        if device == "auto":
            device = "cuda" if limit is not None else "cpu"
        found = plan(
            parse_arguments(rest),
            ranks=options.ranks,
            device=device,
            prompt_tokens=options.prompt_tokens,
            completion_tokens=options.completion_tokens,
            limit=limit,
        )
    except (ConfigError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found.to_dict(), indent=1))
        return 0 if found.fits else 1
    reporter = Reporter()
    show(found, reporter)
    reporter.line(verdict(found))
    if not found.fits:
        for text in changes(found):
            reporter.line(f"  try {text}")
    return 0 if found.fits else 1


if __name__ == "__main__":
    raise SystemExit(main())
