"""The training phase of one optimizer step, ours and TRL's: `python -m benchmarks step`.

Both trainers get the same weights, rollouts, advantages, dtype, attention and optimizer, each in a
process of its own that does a step whenever it is asked, so that rounds interleave. First the
losses and gradients of one step are compared; then memory; then the timed rounds. Nothing is
sampled. Writes `<out>/step_<device>.json`, `.md`, `.svg` and `.csv`.

A part of the time is what runs between two cuts of `parts`; the parts of a trainer sum to its
step. MFU: see `flops`.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import against, plot
from benchmarks.deadline import LATE
from benchmarks.losses.needs import installed_version
from benchmarks.machine import gpu_name, machine
from benchmarks.options import absent_device
from benchmarks.output import RESULTS, out_folder, say

from .case import MODELS, StepCase, distribution, make_sequences, model_config, write_models
from .flops import peak_rate, step_flops
from .report import agreement, row_of, targets
from .worker import serve

TITLES = {
    "ours": ("crpo_fast", "crpo-fast"),
    "trl": ("TRL GRPOTrainer", "trl"),
    "trl_liger": ("TRL GRPOTrainer, use_liger_kernel", "trl"),
}
NOTES = {
    "ours": "packed micro-batches, fused loss",
    "trl": "padded micro-batches, its chunked log-probabilities (its only path since 1.16)",
    "trl_liger": "the same with Liger's layer kernels (RMSNorm, SwiGLU, RoPE)",
}
CPU_NOTE = "; on a CPU it scores every position, prompts and padding too"
# the step's sizes: prompts, sequences of TRL's micro-batch, prompt, completion, longest completion
SIZES = {"cpu": (3, 8, 48, 64, 192), "cuda": (8, 8, 192, 384, 1024)}
READY_SECONDS, STEP_SECONDS = 600, 1800  # after that a worker counts as hung


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    names = "|".join(MODELS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--model", help=f"{names}, or a folder with a config.json (default: by the device)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--attention",
        choices=("sdpa", "eager", "flash_attention_2", "flash_attention_3"),
        default="sdpa",
        help="of both (default sdpa)",
    )
    parser.add_argument("--layout", choices=("packed", "padded"), default="packed", help="ours")
    parser.add_argument("--objective", choices=("dapo", "grpo", "bnpo"), default="dapo")
    parser.add_argument("--kl-coef", type=float, default=0.01, help="0: no reference pass")
    parser.add_argument("--prompts", type=int, help="of one step")
    parser.add_argument("--group-size", type=int, default=8, help="completions per prompt")
    parser.add_argument("--micro-batch", type=int, help="sequences of TRL's; ours: as many slots")
    parser.add_argument("--median-prompt", type=int, help="tokens")
    parser.add_argument("--median-completion", type=int, help="tokens")
    parser.add_argument("--max-completion", type=int, help="tokens")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--steps", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--only", nargs="+", choices=sorted(TITLES), help="these trainers alone")
    parser.add_argument("--gate", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--out", type=out_folder, default=RESULTS)
    against.add_argument(parser, "step")


def run(options: argparse.Namespace, command: str) -> int:
    """Measure, print the page, write the files; with ``--gate`` 1 when a target is missed."""
    problem = check(options)
    if problem:
        print(problem)
        return 2
    report: dict[str, Any] = {"command": command, **measure_step(options, None)}
    plot.publish(report, options.out / f"step_{options.device}")
    status = against.check(report, options.against, options.only)
    missed = [target["text"] for target in report["targets"] if target["met"] is False]
    return status or (1 if options.gate and missed else 0)


def check(options: argparse.Namespace) -> str:
    """What is wrong with the options and what to type, or ""."""
    if reason := absent_device(options.device):
        return reason
    for name in ("steps", "threads", "prompts", "micro_batch", "median_prompt"):
        value = getattr(options, name)
        if value is not None and value < 1:
            return f"--{name.replace('_', '-')}: expected at least 1, got {value}. Type 1."
    for name in ("group_size", "median_completion", "max_completion"):
        value = getattr(options, name)
        if value is not None and value < 2:
            return f"--{name.replace('_', '-')}: expected at least 2, got {value}. Type 2."
    case = make_case(options, Path(), Path())
    if case.num_sequences % case.micro_batch:
        return (
            f"--micro-batch: expected a divisor of {case.num_sequences}, the sequences of the "
            f"step, got {case.micro_batch}. Type --micro-batch {case.group_size}."
        )
    if case.objective == "bnpo" and case.micro_batch != case.num_sequences:
        return (
            "--micro-batch: expected all sequences in one for bnpo, whose mean is over TRL's "
            f"micro-batch, got {case.micro_batch}. Type --micro-batch {case.num_sequences}."
        )
    if case.kl_coef < 0:
        return f"--kl-coef: expected at least 0, got {case.kl_coef}. Type --kl-coef 0."
    try:
        model_config(case.model)
    except ValueError as error:
        return str(error)
    return ""


def make_case(options: argparse.Namespace, policy: Path, reference: Path) -> StepCase:
    """The step that the options ask for; what they leave out is as large as the device bears."""
    prompts, micro_batch, prompt, completion, longest = SIZES[options.device]
    return StepCase(
        model=options.model or ("tiny" if options.device == "cpu" else "qwen3-0.6b"),
        folder=str(policy),
        reference=str(reference),
        device=options.device,
        dtype=options.dtype,
        attention=options.attention,
        layout=options.layout,
        objective=options.objective,
        kl_coef=options.kl_coef,
        prompts=options.prompts or prompts,
        group_size=options.group_size,
        micro_batch=options.micro_batch or micro_batch,
        median_prompt=options.median_prompt or prompt,
        median_completion=options.median_completion or completion,
        max_completion=options.max_completion or longest,
        seed=options.seed,
        checkpointing=options.checkpointing,
        threads=options.threads,
    )


def missing(key: str, device: str) -> str | None:
    """Why a trainer cannot run here, or None."""
    if key == "ours":
        return None
    for package in ("trl", "datasets", "accelerate"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install 'crpo-fast[bench]')"
    if key == "trl_liger":
        if importlib.util.find_spec("liger_kernel") is None:
            return "liger-kernel is not installed (pip install 'crpo-fast[bench]')"
        if device == "cpu":
            return "Liger's layer kernels are Triton and need a GPU"
    return None


class Worker:
    """One trainer in its process.

    Args:
        key: of ``TITLES``.
        case: the step.
    """

    def __init__(self, key: str, case: StepCase) -> None:
        context = multiprocessing.get_context("spawn")
        self.key, self.failure = key, ""
        self.answers: list[dict[str, Any]] = []  # of timed steps
        self.memory: dict[str, int] = {}
        self.gradients: dict[str, Any] = {}
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, key, case), daemon=True)
        self._process.start()
        theirs.close()
        self._wait(self._connection, READY_SECONDS)

    def _wait(self, connection: Connection, seconds: float) -> dict[str, Any]:
        if not connection.poll(seconds):
            self.failure = f"no answer within {seconds:.0f} s"
            return {}
        try:
            answer = connection.recv()
        except EOFError:
            self._process.join(10)
            answer = {"failed": f"its process ended with status {self._process.exitcode}"}
        self.failure = answer.get("failed", "")
        return answer

    def ask(self, request: str) -> dict[str, Any]:
        """One step; {} after a failure."""
        if self.failure:
            return {}
        self._connection.send(request)
        answer = self._wait(self._connection, STEP_SECONDS)
        return {} if self.failure else answer

    def drop(self, reason: str) -> None:
        """Ask for nothing more."""
        self.failure = self.failure or reason

    def close(self) -> None:
        """End the process."""
        if not self.failure:
            self._connection.send("quit")
            self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
        self._connection.close()


def measure_step(options: argparse.Namespace, deadline: float | None) -> dict[str, Any]:
    """The report of a run.

    Args:
        options: of the command.
        deadline: of `time.monotonic`, after which no further round begins; None: no limit.
    """
    begun = time.monotonic()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = model_config(make_case(options, Path(), Path()).model)
        say(f"step: weights of {make_case(options, Path(), Path()).model}")
        case = make_case(options, *write_models(config, options.seed, Path(folder)))
        reasons, workers = {}, []
        for key in options.only or TITLES:
            reasons[key] = missing(key, case.device)
            if reasons[key] is None:
                say(f"step: {TITLES[key][0]} starts")
                workers.append(Worker(key, case))
        try:
            rounds(workers, options.steps, deadline)
        finally:
            for worker in workers:
                worker.close()
    return report_of(case, config, workers, reasons) | {"seconds": time.monotonic() - begun}


def rounds(workers: list[Worker], steps: int, deadline: float | None) -> None:
    """Gradients, memory and seconds of all workers, in interleaved rounds.

    After the deadline only our own trainer still gets what it lacks, one round at least; one that
    has no round by then is dropped with that reason.
    """
    limit = math.inf if deadline is None else deadline
    for worker in workers:
        worker.gradients = ask(worker, "gradients", limit)
    for worker in workers:
        worker.memory = ask(worker, "memory", limit).get("memory", {})
    for worker in workers:
        ask(worker, "time", limit)  # warm: what the counter of bytes kept from being compiled
    for turn in range(steps):
        if turn and time.monotonic() > limit:
            say(f"step: only {turn} rounds ({LATE})")
            break
        for worker in workers:
            if answer := ask(worker, "time", limit):
                worker.answers.append(answer)
                say(f"step, round {turn + 1}: {TITLES[worker.key][0]}: {answer['seconds']:.3f} s")


def ask(worker: Worker, request: str, limit: float) -> dict[str, Any]:
    """One step, unless it would be too late for another's first round."""
    if time.monotonic() > limit and worker.key != "ours" and not worker.answers:
        worker.drop(LATE)
    return worker.ask(request)


def report_of(
    case: StepCase, config: Any, workers: list[Worker], reasons: dict[str, str | None]
) -> dict[str, Any]:
    """Rows, agreement and targets."""
    device = torch.device(case.device)
    where = machine(device)
    found = distribution(make_sequences(case, config.vocab_size), case.micro_batch)
    flops = step_flops(config, found, has_reference=bool(case.kl_coef))
    peak, source = peak_rate(case.torch_dtype, device, gpu_name(where))
    done = {worker.key: worker for worker in workers}
    rows = []
    for key, reason in reasons.items():
        title, package = TITLES[key]
        note = NOTES[key] + (CPU_NOTE if key == "trl" and device.type == "cpu" else "")
        row = {"key": key, "title": title, "note": note, "version": installed_version(package)}
        worker = done.get(key)
        reason = reason or (worker.failure if worker else "")
        if reason or worker is None:
            rows.append({**row, "missing": reason})
            continue
        rows.append(row | row_of(worker.answers, worker.memory, found, sum(flops.values()), peak))
    compared = agreement({w.key: w.gradients for w in workers if w.gradients}, case.dtype)
    sizes = {k: v for k, v in vars(case).items() if k not in ("folder", "reference")}
    return {
        "kind": "step",
        "machine": where,
        "case": {**sizes, "vocab": config.vocab_size, "dim": config.hidden_size},
        "rollouts": found,
        "flops": flops,
        "peak_tflops": peak / 1e12,
        "peak_source": source,
        "rows": rows,
        "agreement": compared,
        "targets": targets(rows, compared, is_gpu=device.type == "cuda"),
    }
