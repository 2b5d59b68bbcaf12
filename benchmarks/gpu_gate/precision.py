"""Gate: values and gradients against fp64, in every mode, for every objective and every option.

The rival of log-probabilities and entropies is a product with fp32 results followed by a softmax in
fp64: ours may err 1.2 times as much, plus what rounding the result itself to fp32 takes. Gradients
are bounded by their relative rms: what rounding the gradient of the logits and the result to bf16
takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import crpo_kernels as ck
from benchmarks.losses.accuracy import exact_result, rms
from benchmarks.losses.baselines import (
    Candidate,
    Result,
    fused,
    policy_arguments,
    scored,
    small_workspace,
)
from benchmarks.losses.cases import Inputs, make_inputs
from crpo_kernels.products import product
from crpo_kernels.spec import PRESETS

from .report import Part
from .scale import Scale

RIVAL, RMS_LIMIT = 1.2, 5e-5  # nats
ROUNDING = 1e-6  # of a result of some nats to fp32, and of sums in fp32
GRADIENT_LIMIT, CACHED_LIMIT = 2.5e-3, 3.5e-3  # relative rms
EXACT = {torch.float32: 1e-4, torch.bfloat16: GRADIENT_LIMIT}  # gradients of small heads, relative
VALUE_LIMIT = 2e-4  # nats and ratios
PADDED = 9  # a ninth of the vocabulary is padding in one of the checks


def modes(backend: str = "triton") -> list[Candidate]:
    """Every way through the head, as candidates."""
    one, two = "one_pass", "two_pass"
    return [
        Candidate("one_pass", "one pass", fused(one, backend)),
        Candidate("one_pass_groups", "one pass in groups", fused(one, backend, small_workspace)),
        Candidate("two_pass", "two passes, E kept", fused(two, backend)),
        Candidate("recompute", "two passes, recomputed", fused(two, backend, small_workspace)),
        Candidate("frozen", "frozen head", fused(one, backend), num_products=2),
        Candidate("scored", "scoring only", scored(backend), num_products=1),
    ]


def precision(part: Part, scale: Scale) -> None:
    """Every mode on one large head."""
    inputs = make_inputs(scale.precision, device=scale.device)
    chosen = torch.randperm(inputs.weight.shape[0], device=scale.device)[:4096]
    columns = torch.cat([chosen, inputs.labels[:64]])
    truth = exact_result(inputs, columns, with_entropy=True)
    rival = rival_result(inputs)
    bounds = {}
    for name in ("logprobs", "entropy"):
        value = rms(getattr(rival, name), getattr(truth, name), relative=False)
        bounds[name] = min(RIVAL * value + ROUNDING, RMS_LIMIT)
        part.results.setdefault("rival_rms", {})[name] = value
    entropy = truth.entropy
    assert entropy is not None, "the truth has everything"
    part.results["entropy_quantiles"] = entropy.quantile(entropy.new_tensor([0.1, 0.9])).tolist()
    for mode in modes():

        def compare(mode: Candidate = mode) -> None:
            got = mode.step(mode.inputs_of(inputs))
            for name, bound in bounds.items():
                value, true = getattr(got, name), getattr(truth, name)
                error = rms(value, true, relative=False)
                most = float((value.double() - true).abs().max())
                part.at_most(f"{mode.title}: {name}, rms in nats", error, bound, largest=most)
            limit = CACHED_LIMIT if mode.key == "two_pass" else GRADIENT_LIMIT
            check_gradients(part, mode.title, got, truth, columns, limit)

        part.run(mode.title, compare)


def rival_result(inputs: Inputs) -> Result:
    """A product with fp32 results, then fp64."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    shape = (hidden.shape[0], weight.shape[0])
    logits = product(hidden, weight.t(), hidden.new_empty(shape, dtype=torch.float32)).double()
    log_p = (logits / inputs.case.temperature).log_softmax(1)
    logprobs = log_p.gather(1, inputs.labels.unsqueeze(1)).squeeze(1)
    return Result(logprobs=logprobs, entropy=-(log_p.exp() * log_p).sum(1))


def check_gradients(
    part: Part, title: str, got: Result, truth: Result, columns: Tensor, limit: float
) -> None:
    """Those that were made."""
    if got.d_hidden is not None and truth.d_hidden is not None:
        error = rms(got.d_hidden, truth.d_hidden, relative=True)
        part.at_most(f"{title}: d_hidden, relative rms", error, limit)
    if got.d_weight is not None and truth.d_weight is not None:
        error = rms(got.d_weight[columns], truth.d_weight, relative=True)
        part.at_most(f"{title}: d_weight, relative rms", error, limit)


def specs() -> Iterator[tuple[str, ck.ObjectiveSpec]]:
    """Every preset, and every option that no preset has."""
    for name in PRESETS:
        yield name, ck.ObjectiveSpec.preset(name)
    for estimator in ("k1", "k2", "k3"):
        spec = ck.ObjectiveSpec.preset("grpo", kl_coef=0.05, kl_estimator=estimator)
        yield f"grpo with {estimator}", spec
    yield "grpo, rho truncated", ck.ObjectiveSpec.preset("grpo", rho_mode="truncate", rho_cap=1.1)
    mask = ck.ObjectiveSpec.preset("grpo", rho_mode="mask", rho_cap=1.2, rho_floor=0.8)
    yield "grpo, rho masked", mask


def presets(part: Part, scale: Scale) -> None:
    """Every objective, on and off policy, in both modes, against the dense oracle in fp64."""
    for dtype in scale.dtypes:
        case = replace(scale.presets, dtype=dtype)
        inputs = make_inputs(case, device=scale.device)
        vectors = off_policy(inputs)
        for name, spec in specs():
            for is_on_policy in (True, False):
                place = "on policy" if is_on_policy else "off policy"
                title = f"{name}, {place}, {str(dtype).split('.')[1]}"
                given = {**policy_arguments(inputs), **vectors, "spec": spec}
                if is_on_policy:
                    given["old_logprobs"] = None
                part.run(title, lambda t=title, g=given, d=dtype: compare_preset(part, t, g, d))


def off_policy(inputs: Inputs) -> dict[str, Any]:
    """Vectors around the true log-probabilities, so that some tokens are clipped."""
    hidden, weight = inputs.hidden.detach().double(), inputs.weight.detach().double()
    out = ck.linear_logprobs(
        hidden, weight, inputs.labels, temperature=inputs.case.temperature, backend="dense"
    )
    logprobs = out.logprobs.float()
    g = torch.Generator(logprobs.device).manual_seed(1)

    def near(spread: float) -> Tensor:
        noise = torch.randn(logprobs.shape, generator=g, device=logprobs.device)
        return logprobs + spread * noise

    num_rows = logprobs.numel()
    bounds = torch.tensor([0, num_rows // 3, num_rows // 2, num_rows], device=logprobs.device)
    weights = torch.rand(num_rows, generator=g, device=logprobs.device) / num_rows
    return {
        "old_logprobs": near(0.2),
        "rollout_logprobs": near(0.2),
        "ref_logprobs": near(0.5),
        "z_loss_weights": 1e-3 * weights,
        "cu_seqlens": bounds.int(),
    }


def compare_preset(part: Part, title: str, given: dict[str, Any], dtype: torch.dtype) -> None:
    """Loss, statistics and gradients of both modes."""
    true_loss, true_stats, *true_gradients = policy_call(given, "dense", "two_pass", torch.float64)
    for mode in ("auto", "two_pass"):  # auto is one_pass wherever that can run
        loss, stats, *gradients = policy_call(given, "triton", mode, dtype)
        size = float(true_stats.token_loss.abs().mean()) + 1.0
        error = float((loss.double() - true_loss).abs()) / size
        part.at_most(f"{title}, {mode}: loss", error, VALUE_LIMIT)
        names = ("logprobs", "entropy", "lse", "token_loss", "ratio", "kl", "rho")
        worst = {
            name: float(
                (getattr(stats, name).double() - getattr(true_stats, name)).abs().max()
                / getattr(true_stats, name).abs().max().clamp(min=1.0)
            )
            for name in names
        }
        part.at_most(f"{title}, {mode}: statistics", worst_of(worst), VALUE_LIMIT, each=worst)
        differ = int((stats.is_clipped != true_stats.is_clipped).sum())
        count = int(true_stats.is_clipped.sum())
        part.at_most(f"{title}, {mode}: clip flags that differ", differ, 0, clipped=count)
        limit = CACHED_LIMIT if mode == "two_pass" and dtype != torch.float32 else EXACT[dtype]
        for name, got, true in zip(
            ("d_hidden", "d_weight"), gradients, true_gradients, strict=True
        ):
            part.at_most(f"{title}, {mode}: {name}", rms(got, true, relative=True), limit)


def worst_of(values: dict[str, float]) -> float:
    """The largest; NaN if there is one."""
    return float(torch.tensor(list(values.values())).max())


def policy_call(
    given: dict[str, Any], backend: str, mode: str, dtype: torch.dtype
) -> tuple[Tensor, ck.TokenStats, Tensor, Tensor]:
    """(loss, statistics, d_hidden, d_weight) with hidden and weight in ``dtype``."""
    hidden, weight = (
        given[name].detach().to(dtype).requires_grad_() for name in ("hidden", "weight")
    )
    changed = {**given, "hidden": hidden, "weight": weight}
    loss, stats = ck.linear_policy_loss(**changed, backend=backend, mode=mode)
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), stats, d_hidden, d_weight


def option_sets(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """What a head may have besides its weight, one by one and together."""
    num_rows, vocab_size = inputs.labels.numel(), inputs.weight.shape[0]
    g = torch.Generator(inputs.labels.device).manual_seed(2)
    at = {"generator": g, "device": inputs.labels.device}
    bias = torch.randn(vocab_size, **at)
    padding = bias.clone()
    padding[-(vocab_size // PADDED) :] = -torch.inf  # a padded vocabulary
    temperature = 0.5 + torch.rand(num_rows, **at)
    rows = torch.arange(0, num_rows, 2, device=inputs.labels.device)
    together = {"bias": bias, "temperature": temperature, "logit_scale": 0.7, "logit_softcap": 9.0}
    return {
        "bias": {"bias": bias},
        "padded vocabulary": {"bias": padding},
        "temperature per token": {"temperature": temperature},
        "scale": {"logit_scale": -0.3},
        "soft cap": {"logit_softcap": 5.0},
        "rows": {"rows": rows},
        "all together": {**together, "rows": rows},
    }


def options(part: Part, scale: Scale) -> None:
    """Every option of the head, through all three outputs, and the stage weights."""
    case = replace(scale.presets, dtype=torch.float32)
    inputs = make_inputs(case, device=scale.device)
    vocab_size = inputs.weight.shape[0]
    real = inputs.labels % (vocab_size - vocab_size // PADDED)  # none of the padding
    for name, given in option_sets(inputs).items():
        kept = real.clone()
        kept[1::5] = ck.IGNORE_INDEX
        if "rows" in given:  # listed rows carry a label
            kept[given["rows"]] = real[given["rows"]]
        part.run(name, lambda n=name, g=given, k=kept: compare_option(part, n, inputs, k, g))
    part.run("stage weights", lambda: compare_stage_weights(part, scale))


def compare_option(
    part: Part, name: str, inputs: Inputs, labels: Tensor, given: dict[str, Any]
) -> None:
    """Values and gradients of a loss on all outputs, against the dense oracle in fp64."""
    true = outputs_of(inputs, labels, given, "dense", torch.float64)
    got = outputs_of(inputs, labels, given, "triton", torch.float32)
    for key, value in got.items():
        if key.startswith("d_"):
            part.at_most(f"{name}: {key}", rms(value, true[key], relative=True), 1e-4)
        else:
            part.at_most(f"{name}: {key}", float((value - true[key]).abs().max()), VALUE_LIMIT)


def outputs_of(
    inputs: Inputs, labels: Tensor, given: dict[str, Any], backend: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients of `linear_logprobs` under fixed slopes."""
    leaves = {"hidden": inputs.hidden, "weight": inputs.weight}
    if given.get("bias") is not None:
        leaves["bias"] = given["bias"]
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in leaves.items()}
    changed: dict[str, Any] = {**given, **leaves, "labels": labels}
    out = ck.linear_logprobs(**changed, backend=backend)
    slopes = torch.linspace(-1, 1, labels.numel(), device=labels.device, dtype=torch.float64)
    parts = (out.logprobs * slopes, out.entropy * slopes.flip(0), 0.1 * out.lse * slopes)
    made = torch.autograd.grad(sum(p.sum() for p in parts), list(leaves.values()))  # type: ignore[arg-type]
    found = {f"d_{k}": grad.double() for k, grad in zip(leaves, made, strict=True)}
    if "bias" in leaves:  # -inf columns have no gradient to speak of
        found["d_bias"] = found["d_bias"].where(leaves["bias"].isfinite(), 0.0)
    return {**{k: v.detach().double() for k, v in out._asdict().items()}, **found}


def compare_stage_weights(part: Part, scale: Scale) -> None:
    """Every reduction against the formula, worked in fp64 on the host."""
    g = torch.Generator().manual_seed(3)
    num_rows, num_stages = 40 if scale.is_rehearsal else 10_007, 5
    stage_ids = torch.randint(-1, num_stages, (num_rows,), generator=g)
    bounds = torch.tensor([0, num_rows // 7, num_rows // 2, num_rows // 2, num_rows]).int()
    coefs = torch.linspace(-0.06, 0.06, num_stages)
    for reduction in ("sequence_mean", "present_only", "token_mean"):
        for length in (None, 80):
            expected = stage_weights(stage_ids, bounds, coefs.double(), reduction, length)
            got = ck.stage_entropy_weights(
                stage_ids.to(scale.device),
                bounds.to(scale.device),
                coefs.to(scale.device),
                reduction=reduction,
                reference_length=length,
            ).cpu()
            error = float((got - expected).abs().max() / expected.abs().max())
            part.at_most(f"stage weights, {reduction}, length {length}", error, 1e-6)


def stage_weights(
    stage_ids: Tensor, bounds: Tensor, coefs: Tensor, reduction: str, length: int | None
) -> Tensor:  # [T]
    """The definition, one token after the other."""
    sequences = torch.bucketize(torch.arange(stage_ids.numel()), bounds[1:], right=True)  # [T]
    counts = torch.zeros(bounds.numel() - 1, coefs.numel(), dtype=torch.float64)  # [B, S]
    for b, k in zip(sequences.tolist(), stage_ids.tolist(), strict=True):
        if k >= 0:
            counts[b, k] += 1
    weights = torch.zeros(stage_ids.numel(), dtype=torch.float64)
    for t, (b, k) in enumerate(zip(sequences.tolist(), stage_ids.tolist(), strict=True)):
        if k < 0:
            continue
        tokens = counts[b, k]
        over = {
            "sequence_mean": counts.shape[0] * tokens,
            "present_only": (counts[:, k] > 0).sum() * tokens,
            "token_mean": counts[:, k].sum(),
        }[reduction]
        ramp = 1.0 if length is None else min(1.0, float(tokens) / length)
        weights[t] = coefs[k] * ramp / over
    return weights
