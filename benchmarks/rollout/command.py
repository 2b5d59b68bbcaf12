"""Tokens per second of the rollout engines: `python -m benchmarks rollout --device cpu`.

The embedded engines beside transformers' plain `generate`: the same random model, prompts and
limits, in interleaved rounds. A generation of one token is the prefill; what a whole generation
takes beyond it is the decoding. Every logprob of a first run is compared with the trainer's.
Writes `<out>/rollout_<device>.json`, `.md`, `.svg` and `.csv`.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from benchmarks import against, plot
from benchmarks.clock import Clock, summary
from benchmarks.deadline import LATE, OutOfTime, at_most_seconds
from benchmarks.live_bytes import LiveBytes, counting
from benchmarks.machine import machine
from benchmarks.options import absent_device, device_of
from benchmarks.output import RESULTS, out_folder, say
from benchmarks.step.case import MODELS, model_config
from crpo_fast.config import RolloutConfig

from .case import CANDIDATES, RolloutCase, attention_of, trainer_differences

CASES = {
    "cpu": (
        RolloutCase("ragged", 8, 8, 48, 48),
        RolloutCase("even", 4, 8, 48, 32, is_ragged=False),
        RolloutCase("one prompt", 1, 8, 48, 32),
    ),
    "cuda": (
        RolloutCase("ragged", 16, 8, 192, 384),
        RolloutCase("even", 16, 8, 192, 256, is_ragged=False),
        RolloutCase("large batch", 64, 8, 192, 256),
        RolloutCase("one prompt", 1, 8, 192, 256),
    ),
}
ROUNDS = 5
GRACE = 4.0  # seconds after a case's deadline when it is broken off
THREAD = "it generates in a thread of its own, which the counter of a CPU's tensors does not see"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--device", choices=sorted(CASES), default="cpu")
    names = "|".join(MODELS)
    parser.add_argument("--model", help=f"{names}, or a folder with a config.json (random weights)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompts", type=int, help="one case of one's own: different prompts")
    parser.add_argument("--group-size", type=int, default=8, help="samples of each prompt")
    parser.add_argument("--median-prompt", type=int, default=48, help="tokens")
    parser.add_argument("--max-tokens", type=int, default=48, help="most tokens of a completion")
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), help="these alone")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"timed (default {ROUNDS})")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--out", type=out_folder, default=RESULTS)
    against.add_argument(parser, "rollout")


def run(options: argparse.Namespace, command: str) -> int:
    """Measure, print the page, write the files; 1: wrong logprobs, or worse --against."""
    problem = check(options)
    if problem:
        print(problem)
        return 2
    report: dict[str, Any] = {"command": command, **measure_rollout(options, math.inf)}
    plot.publish(report, options.out / f"rollout_{options.device}")
    status = against.check(report, options.against, options.only)
    is_wrong = any(row.get("wrong") for case in report["cases"] for row in case["rows"])
    return status or int(is_wrong)


def check(options: argparse.Namespace) -> str:
    """What is wrong with the options and what to type, or ""."""
    if reason := absent_device(options.device):
        return reason
    least = {"group_size": 1, "median_prompt": 2, "max_tokens": 2, "rounds": 1, "threads": 1}
    for name, smallest in {"prompts": 1, **least}.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            option = f"--{name.replace('_', '-')}"
            return f"{option}: expected at least {smallest}, got {value}. Type {option} {smallest}."
    try:
        model_config(model_name(options))
    except ValueError as error:
        return str(error)
    return ""


def model_name(options: argparse.Namespace) -> str:
    """The model that is asked for, or the device's."""
    return options.model or ("tiny" if options.device == "cpu" else "qwen3-0.6b")


def cases_of(options: argparse.Namespace) -> tuple[RolloutCase, ...]:
    """The cases of the device, or the one of the command line."""
    if options.prompts is None:
        return CASES[options.device]
    sizes = options.prompts, options.group_size, options.median_prompt, options.max_tokens
    return (RolloutCase("own", *sizes),)


def measure_rollout(options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """The report of a run but for its command.

    Args:
        options: of the command.
        deadline: of `time.monotonic`, after which nothing begins.
    """
    begun = time.monotonic()
    torch.set_num_threads(options.threads)
    hf_logging.set_verbosity_error()  # plain generate warns about sampling options at each call
    device = device_of(options)
    config, attention = model_config(model_name(options)), attention_of(device, options.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, options.dtype), attn_implementation=attention
        )
    model = model.to(device).eval()
    keys, cases, found = options.only or list(CANDIDATES), cases_of(options), []
    if not math.isinf(deadline):  # few seconds are better spent on a case that fits them
        cases = tuple(sorted(cases, key=lambda case: case.num_prompts * case.max_tokens))
    for place, case in enumerate(cases):
        left = deadline - time.monotonic()
        end = deadline if math.isinf(left) else time.monotonic() + left / (len(cases) - place)
        found.append(bounded(case, model, keys, options.rounds, end))
    return {
        "kind": "rollout",
        "machine": machine(device),
        "model": model_name(options),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": options.dtype,
        "attention": attention,
        "cases": found,
        "targets": [],
        "seconds": time.monotonic() - begun,
    }


def bounded(
    case: RolloutCase, model: Any, keys: list[str], rounds: int, until: float
) -> dict[str, Any]:
    """`measure_case`, broken off ``GRACE`` after its time: that costs this case, not the report."""
    if math.isinf(until):
        return measure_case(case, model, keys, rounds, until)
    try:
        with at_most_seconds(max(GRACE, until + GRACE - time.monotonic())):
            return measure_case(case, model, keys, rounds, until)
    except OutOfTime:
        titles = {key: (CANDIDATES[key][0], CANDIDATES[key][1]) for key in keys}
        rows = [{"key": k, "title": t, "kind": kind, "note": "", "missing": LATE}
                for k, (t, kind) in titles.items()]  # fmt: skip
        return {"name": case.name, "case": case.shape, "rows": rows}


def measure_case(
    case: RolloutCase, model: Any, keys: list[str], rounds: int, until: float
) -> dict[str, Any]:
    """Rows of one case: a checked run of each candidate, its memory, then rounds of all."""
    vocab_size = model.config.vocab_size
    prompts = case.prompts(vocab_size)
    rows: dict[str, dict[str, Any]] = {}
    for key in keys:
        title, kind, generate, note = CANDIDATES[key]
        rows[key] = {"key": key, "title": title, "version": "", "kind": kind, "note": note}
        if time.monotonic() > until:
            rows[key]["missing"] = LATE
            continue
        say(f"rollout, {case.name}: {title}: logprobs and memory")
        arguments = (model, prompts, case.group_size, case.params(vocab_size))
        first = generate(*arguments, 0, True)
        rows[key] |= checked(trainer_differences(model, prompts, case.group_size, first), kind)
        rows[key] |= peak_of(key, model, lambda g=generate, a=arguments: g(*a, 0, False))
    times = timed(case, model, prompts, {k: r for k, r in rows.items() if "missing" not in r},
                  rounds, until)  # fmt: skip
    for key, (parts, tokens) in times.items():
        rows[key] |= speeds(parts, tokens, sum(map(len, prompts)), case)
    plain = rows.get("generate", {}).get("tokens_per_second", {}).get("median")
    for row in rows.values():
        if plain and "tokens_per_second" in row:
            row["over_generate"] = row["tokens_per_second"]["median"] / plain
    lengths = [len(p) for p in prompts]
    return {
        "name": case.name,
        "case": case.shape,
        **{k: v for k, v in vars(case).items() if k != "name"},
        "prompt_tokens": sum(lengths),
        "prompt_quantiles": [min(lengths), sorted(lengths)[len(lengths) // 2], max(lengths)],
        "rows": list(rows.values()),
    }


def timed(
    case: RolloutCase,
    model: Any,
    prompts: list[list[int]],
    rows: dict[str, dict[str, Any]],
    rounds: int,
    until: float,
) -> dict[str, tuple[list[tuple[float, float]], list[int]]]:
    """For each candidate (seconds of the prefill, of everything) and sampled tokens, by round."""
    vocab_size, clock = model.config.vocab_size, Clock(model.device)
    found: dict[str, tuple[list[tuple[float, float]], list[int]]] = {k: ([], []) for k in rows}
    for turn in range(rounds):
        if turn and time.monotonic() > until:
            say(f"rollout, {case.name}: only {turn} rounds ({LATE})")
            break
        for key, (parts, tokens) in found.items():
            generate, made = CANDIDATES[key][2], []
            shortest, whole = case.params(vocab_size, 1), case.params(vocab_size)

            def step(params: Any, g: Any = generate, made: list = made, turn: int = turn) -> None:
                made.append(g(model, prompts, case.group_size, params, turn, False))

            first = clock.seconds(lambda s=step, p=shortest: s(p))
            everything = clock.seconds(lambda s=step, p=whole: s(p))
            parts.append((first, everything))
            tokens.append(made[-1].num_tokens)
            say(f"rollout, {case.name}, round {turn + 1}: {key}: {everything:.3g} s")
    return found


def speeds(
    parts: list[tuple[float, float]], tokens: list[int], prompt_tokens: int, case: RolloutCase
) -> dict[str, Any]:
    """Seconds and tokens per second with their bands; each round's tokens over its own seconds."""
    count = case.num_prompts * case.group_size
    rounds = list(zip(parts, tokens, strict=True))
    decoded = [(n - count) / (both - first) for (first, both), n in rounds if both > first]
    found: dict[str, Any] = {
        "seconds": {"warm": summary([both for _, both in parts])},
        "prefill_seconds": summary([first for first, _ in parts]),
        "sampled_tokens": sum(tokens) / len(tokens),
        "tokens_per_second": summary([n / both for (_, both), n in rounds]),
        "prefill_tokens_per_second": summary([prompt_tokens / first for first, _ in parts]),
    }
    return found | ({"decode_tokens_per_second": summary(decoded)} if decoded else {})


def checked(differences: torch.Tensor, kind: str) -> dict[str, Any]:
    """How far the logprobs are from the trainer's; an engine beyond the trainer's bound is wrong.

    The bound is the default of `rollout.max_mismatch`: a run ends where its first batch is beyond.
    """
    bound = RolloutConfig().max_mismatch
    mean = float(differences.mean())
    is_wrong = kind == "ours" and not mean <= bound  # NaN is wrong
    wrong = f"mean |logprob difference| {mean:.3g} nats, at most {bound}" if is_wrong else ""
    tokens = differences.numel()
    return {
        "mismatch": {"max": float(differences.max()), "mean": mean, "tokens": tokens},
        "wrong": wrong,
    }


def peak_of(key: str, model: Any, step: Any) -> dict[str, Any]:
    """Peak bytes beyond the weights: cache, logits and everything else."""
    device = model.device
    if device.type == "cpu" and key == "hf":
        return {"lacks": {"peak_bytes": THREAD}}
    with counting(device, list(model.parameters())) as counter:
        step()
        peak = counter.peak
    assert isinstance(counter, LiveBytes) or device.type == "cuda"
    return {"peak_bytes": peak}
