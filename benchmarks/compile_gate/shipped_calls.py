"""What the compile gate compiles: launches of the package's own code, on tensors without memory.

The chunk loop runs on fake tensors inside `recording`, so types, row pitches, offsets of chunks and
missing arguments are those of real calls. Options meet in pairs: every two settings of two options
occur together in some call.
"""

from __future__ import annotations

import importlib
import pkgutil
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import crpo_kernels
from crpo_kernels import ObjectiveSpec
from crpo_kernels.chunked import Head, backprop, one_pass, score
from crpo_kernels.factors import Factors, Needs
from crpo_kernels.launch_triton import recording
from crpo_kernels.plan import make_plan, padded
from crpo_kernels.row_table import COLUMNS, Objective
from crpo_kernels.rows import LogitView
from crpo_kernels.spec import KL_ESTIMATORS, POLICIES, PRESETS, RHO_MODES, TokenInputs
from crpo_kernels.terms import Coefficients
from crpo_kernels.work_triton import TritonRows

from .pairwise import pairwise
from .report import Job
from .shipped_scoring import scoring_jobs

DIM = 1024
LARGE, ODD = (8192, 151936), (3000, 50257)  # rows, vocabulary; dZ of the first is above 2 GiB
LEAST_STREAM = 4096  # a vocabulary of less is one or two loads of a program
WORKSPACES = {"all": 1 << 33, "little": 1 << 28}  # bytes, for the exponentials of all rows or not
BOUNDS = ("clip_low", "clip_high", "kl_coef", "rho_cap", "rho_floor")
OPTIONS: dict[str, tuple] = {
    "policy": POLICIES,
    "kl": (None, *KL_ESTIMATORS),
    "rho": RHO_MODES,
    "old": (True, False),
    "entropy": (True, False),
    "z_loss": (False, True),
    "bias": (False, True),
    "softcap": (None, 30.0),
    "temperature": (0.7, "per token"),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "shape": (LARGE, ODD),
    "kept": ("all", "little"),  # of two passes
}

OF_LOSS = ("policy", "kl", "rho", "old")  # in two passes the loss runs in torch


def shipped_jobs() -> list[Job]:
    """Everything that the package can launch, and the objective by itself.

    Raises:
        ValueError: a kernel of the package that none of the calls launches.
    """
    jobs = [*stage_jobs(), *objective_jobs(), *scoring_jobs()]
    for settings in head_calls():
        with recording() as launches:
            call_head(**settings)
        streams = settings["shape"][1] >= LEAST_STREAM
        name = describe(settings)
        jobs += [Job(name, x.kernel, x.arguments, x.meta, streams_rows=streams) for x in launches]
    missing = sorted(shipped_kernels() - {job.kernel.__name__ for job in jobs})
    if missing:
        raise ValueError(
            f"shipped_calls: expected a call that launches every kernel, got none for {missing}. "
            "Add one to benchmarks/compile_gate/shipped_calls.py."
        )
    return jobs


def shipped_kernels() -> set[str]:
    """The name of every ``*_kernel`` in the package's Triton modules."""
    found = set()
    for module in pkgutil.iter_modules(crpo_kernels.__path__):
        if module.name.endswith("_triton"):
            names = vars(importlib.import_module(f"crpo_kernels.{module.name}"))
            found |= {n for n in names if n.endswith("_kernel") and not n.startswith("_")}
    return found


def head_calls() -> list[dict[str, Any]]:
    """Presets as they are meant at the size of a real head, options in pairs, a tiny vocabulary."""
    presets = [{"preset": name, "shape": LARGE} for name in PRESETS]
    both = {k: v for k, v in OPTIONS.items() if k not in OF_LOSS}
    alone = {k: v for k, v in OPTIONS.items() if k != "kept"}
    watched: dict[str, Any] = {"kl": "unweighted", "shape": LARGE}  # a reference, but kl_coef = 0
    tiny: dict[str, Any] = {"shape": (32, 700)}
    calls: dict[str, list[dict[str, Any]]] = {
        "one_pass": [*presets, watched, *pairwise(alone), tiny],
        "two_pass": [*pairwise(both), tiny],
        "shard": [{"shape": LARGE}, {"shape": ODD, "bias": True, "softcap": 30.0}],
    }
    return [{"mode": mode, **call} for mode, rows in calls.items() for call in rows]


def describe(settings: dict[str, Any]) -> str:
    """Settings in a few words."""
    words = []
    for name, value in settings.items():
        if value is True:
            words.append(name)
        elif name == "shape":
            words.append("x".join(map(str, value)))
        elif name in ("softcap", "temperature") and value is not None:
            words.append(f"{name} {value}")
        elif value not in (None, False):
            words.append(str(value).removeprefix("torch."))
    return " ".join(words)


def call_head(
    mode: str,
    shape: tuple[int, int],
    preset: str | None = None,
    policy: str = "clip",
    kl: str | None = None,
    rho: str | None = None,
    old: bool = False,
    entropy: bool = True,
    z_loss: bool = False,
    bias: bool = False,
    softcap: float | None = None,
    temperature: float | str = 0.7,
    dtype: torch.dtype = torch.bfloat16,
    kept: str = "all",
) -> None:
    """The launches of one call with gradients; arguments as in OPTIONS."""
    num_rows, vocab_size = shape
    spec = ObjectiveSpec(policy=policy, rho_mode=rho)
    if kl in KL_ESTIMATORS:
        spec = ObjectiveSpec(policy=policy, rho_mode=rho, kl_coef=0.01, kl_estimator=kl)
    if preset is not None:
        spec = ObjectiveSpec.preset(preset)
    with FakeTensorMode():

        def row_values(is_given: bool = True) -> Tensor | None:  # [T]
            return torch.empty(num_rows) if is_given else None

        labels = torch.empty(num_rows, dtype=torch.int64)
        inputs = TokenInputs(
            labels,
            torch.empty(num_rows),
            advantages=row_values(spec.policy != "sft"),
            entropy_weights=row_values(entropy),
            z_loss_weights=row_values(z_loss),
            old_logprobs=row_values(old and spec.policy != "gspo"),
            rollout_logprobs=row_values(rho is not None),
            ref_logprobs=row_values(kl is not None or spec.kl_coef > 0),
        )
        view = LogitView.make(
            torch.empty(vocab_size) if bias else None,
            torch.empty(num_rows) if isinstance(temperature, str) else temperature,
            1.0,
            softcap,
        )
        hidden = torch.empty(num_rows, DIM, dtype=dtype)
        weight = torch.empty(vocab_size, DIM, dtype=dtype)
        workspace = WORKSPACES[kept]
        run_mode(mode, hidden, weight, view, Objective(spec, inputs, None), workspace)


def run_mode(
    mode: str,
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    view: LogitView,
    objective: Objective,
    workspace_bytes: int,
) -> None:
    """All passes of a mode; of a shard of the vocabulary the one that is its own."""
    inputs = objective.inputs
    if mode == "shard":
        num_rows, vocab_size = hidden.shape[0], weight.shape[0]
        raw = hidden.new_empty(num_rows, padded(vocab_size), dtype=torch.float32)
        TritonRows().sums(raw[:, :vocab_size], inputs.labels, view)
        return
    plan = make_plan(
        hidden,
        weight,
        hidden.shape[0],
        backend="triton",
        mode=mode,
        workspace_bytes=workspace_bytes,
        needs_weight_grad=True,
        is_compiled=False,
    )
    factors = Factors(hidden, weight, view.bias)
    needs = Needs(hidden=True, weight=True, bias=view.bias is not None)
    head = Head(None, inputs.labels, view, plan, needs)
    if mode == "one_pass":
        one_pass(factors, head, objective)
        return
    table, kept = score(factors, head)
    values = Coefficients(inputs.token_weights, inputs.entropy_weights, inputs.z_loss_weights)
    backprop(factors, head, table.stats(), values, kept)


def stage_jobs() -> list[Job]:
    """Stage entropy weights: both integer dtypes, one to many stages."""
    from crpo_kernels.stage_triton import stage_counts_fwd, stage_weights_fwd

    jobs = []
    integers = (torch.int32, torch.int64)
    for ids_dtype, bounds_dtype, num_stages in product(integers, integers, (5, 33)):
        stage_ids = torch.empty(100_000, dtype=ids_dtype, device="meta")
        cu_seqlens = torch.empty(65, dtype=bounds_dtype, device="meta")
        with recording() as launches:
            stage_counts_fwd(stage_ids, cu_seqlens, num_stages)
            stage_weights_fwd(stage_ids, cu_seqlens, torch.empty(64, num_stages, device="meta"))
        name = f"ids {ids_dtype}, cu_seqlens {bounds_dtype}, {num_stages} stages"
        jobs += [Job(name.replace("torch.", ""), x.kernel, x.arguments, x.meta) for x in launches]
    return jobs


def objective_jobs() -> list[Job]:
    """The objective compiled alone: every two of policy term, KL estimator and rho mode."""
    from .alone_triton import objective_kernel

    size = 4096

    def row_values(*columns: int) -> Tensor:
        return torch.empty(*columns, size, device="meta")

    jobs = []
    for settings in pairwise({name: OPTIONS[name] for name in ("policy", "kl", "rho")}):
        policy, estimator, rho_mode = settings.values()
        arguments = {
            "values_ptr": row_values(4),
            "table_ptr": row_values(len(COLUMNS)),
            "factors_ptr": row_values(2),
            "stride": size,
            "weights_ptr": row_values(),
            "advantages_ptr": row_values(),
            "old_logprobs_ptr": row_values(),
            "rollout_logprobs_ptr": None if rho_mode is None else row_values(),
            "ref_logprobs_ptr": None if estimator is None else row_values(),
            **{name: getattr(ObjectiveSpec(kl_coef=0.01, rho_floor=0.5), name) for name in BOUNDS},
            "POLICY": policy,
            "KL_ESTIMATOR": estimator or "k3",
            "RHO_MODE": rho_mode,
            "USES_KL": estimator is not None,
            "BLOCK_T": 256,
        }
        name = f"{policy} {estimator or 'no kl'} {rho_mode or 'no rho'}"
        jobs.append(Job(name, objective_kernel, arguments, {"num_warps": 4}, is_objective=True))
    return jobs
