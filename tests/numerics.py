"""Shared by the tests of the kernels: problems and comparisons."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import crpo_kernels as ck

PRESETS = ("crpo", "grpo", "bnpo", "dapo", "dr_grpo", "gspo", "cispo", "sft")

TINY = 12_000  # bytes of workspace: several chunks
WAYS = [
    {"backend": "dense"},
    {"mode": "one_pass"},
    {"mode": "two_pass"},
    {"mode": "one_pass", "workspace_bytes": TINY},
    {"mode": "two_pass", "workspace_bytes": TINY},
]
FAST_WAYS = WAYS[1:]


def way_id(way):
    return "-".join(str(v) for v in way.values())


def spec_of(preset, **overrides):
    return ck.ObjectiveSpec.preset(preset, kl_coef=0.05, **overrides)


def is_possible(way, preset, on_policy):
    """Off-policy gspo is one pass where whole sequences fit a chunk: not in TINY ones."""
    is_tiny = way.get("mode") == "one_pass" and "workspace_bytes" in way
    return not (preset == "gspo" and not on_policy and is_tiny)


@dataclass
class Problem:
    """One call of the loss with fp64 leaves; `tensors` casts and copies them."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [T]
    bias: Tensor  # [V]
    temperature: Tensor  # [T]
    vectors: dict[str, Tensor] = field(default_factory=dict)  # [T] each
    cu_seqlens: Tensor | None = None

    def rounded(self, dtype, device="cpu") -> Problem:
        """The same with values that ``dtype`` holds (still fp64), on a device."""

        def moved(tensor):
            return tensor.to(dtype).double().to(device) if tensor.is_floating_point() else tensor

        values = {
            name: moved(value).to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return Problem(**values, vectors={k: moved(v) for k, v in self.vectors.items()})

    def leaves(self, dtype, bias=False, needs=("hidden", "weight", "bias")):
        """(hidden, weight, bias or None) as fresh leaves."""
        made = {}
        for name in ("hidden", "weight", "bias"):
            made[name] = getattr(self, name).to(dtype).clone().requires_grad_(name in needs)
        return made["hidden"], made["weight"], made["bias"] if bias else None


def make_problem(num_rows=37, vocab=101, dim=16, ignored=5, seed=0) -> Problem:
    """Random but realistic: entropies of 1-3 nats, old and reference policies near by."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = rand(num_rows, dim), rand(vocab, dim)
    labels = torch.randint(0, vocab, (num_rows,), generator=g)
    if ignored:
        labels[::ignored] = ck.IGNORE_INDEX
    counted = labels.clamp(min=0)
    logprobs = (hidden @ weight.t() / 0.9).log_softmax(1).gather(1, counted[:, None])[:, 0]
    vectors = {
        "advantages": rand(num_rows),
        "token_weights": rand(num_rows).abs() / num_rows,
        "entropy_weights": rand(num_rows, scale=0.1) / num_rows,
        "z_loss_weights": rand(num_rows, scale=0.01).abs() / num_rows,
        "old_logprobs": logprobs + rand(num_rows, scale=0.25),
        "rollout_logprobs": logprobs + rand(num_rows, scale=0.25),
        "ref_logprobs": logprobs + rand(num_rows, scale=0.4),
    }
    bounds = [0, num_rows // 3, num_rows // 2, num_rows]
    return Problem(
        hidden,
        weight,
        labels,
        rand(vocab, scale=0.3),
        0.5 + torch.rand(num_rows, generator=g, dtype=torch.float64),
        vectors,
        torch.tensor(bounds, dtype=torch.int32),
    )


def run_loss(problem, dtype, *, bias=False, upstream=1.0, drop=(), needs=None, **options):
    """(loss, gradients by name, stats) of one call."""
    needs = ("hidden", "weight", "bias") if needs is None else needs
    hidden, weight, bias_leaf = problem.leaves(dtype, bias, needs)
    vectors = {k: v for k, v in problem.vectors.items() if k not in drop}
    options.setdefault("cu_seqlens", problem.cu_seqlens)
    loss, stats = ck.linear_policy_loss(
        hidden, weight, problem.labels, bias=bias_leaf, **vectors, **options
    )
    if needs:
        (loss * upstream).backward()
    grads = {"hidden": hidden.grad, "weight": weight.grad}
    if bias:
        grads["bias"] = bias_leaf.grad
    return loss.detach(), grads, stats


def run_strided(problem, dtype, shape, **options):
    """`run_loss` on rows of ``shape``: hidden lies transposed, weight in every second column."""
    hidden, weight, _ = problem.leaves(dtype)
    lying = hidden.new_empty(hidden.shape[::-1]).t().copy_(hidden.detach()).requires_grad_()
    num_rows, dim = weight.shape
    wide, columns = weight.new_full((num_rows, 2 * dim + 4), torch.nan), slice(3, 3 + 2 * dim, 2)
    wide[:, columns] = weight.detach()
    wide.requires_grad_()
    loss, stats = ck.linear_policy_loss(
        lying.unflatten(0, shape),
        wide[:, columns],
        problem.labels.view(shape),
        **{k: v.view(shape) for k, v in problem.vectors.items()},
        **options,
    )
    loss.backward()
    return loss.detach(), {"hidden": lying.grad, "weight": wide.grad[:, columns]}, stats


def rel_error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth| / max |truth|; the absolute error where the truth is 0 everywhere."""
    assert value.shape == truth.shape, (value.shape, truth.shape)
    if not truth.numel():
        return 0.0
    value, truth = value.double(), truth.double()
    scale = float(truth.abs().max())
    return float((value - truth).abs().max()) / (scale if scale > 0 else 1.0)


def rms(value: Tensor, truth: Tensor) -> float:
    """Root mean square of the error, relative to that of the truth."""
    difference = value.detach().double() - truth.detach()
    return float((difference.square().mean() / truth.detach().square().mean()).sqrt())


def assert_near(value: Tensor, truth: Tensor, tolerance: float, what: str = "") -> None:
    """Relative error within the tolerance; says where it is largest."""
    error = rel_error(value, truth)
    if not error <= tolerance:
        worst = int((value.double() - truth.double()).abs().nan_to_num(torch.inf).argmax())
        at = (float(value.reshape(-1)[worst]), float(truth.reshape(-1)[worst]))
        raise AssertionError(
            f"{what}: relative error {error:.2e} > {tolerance:.0e}; "
            f"at flat index {worst}: {at[0]} for {at[1]}"
        )


def assert_same_result(result, truth, tolerance: float) -> None:
    """Loss, gradients and every statistic of `run_loss`."""
    loss, grads, stats = result
    true_loss, true_grads, true_stats = truth
    assert_near(loss, true_loss, tolerance, "loss")
    for name, true_grad in true_grads.items():
        if true_grad is None:
            assert grads[name] is None, name
        else:
            assert_near(grads[name], true_grad, tolerance, f"gradient of {name}")
    for name in stats._fields:
        assert_near(getattr(stats, name), getattr(true_stats, name), tolerance, name)
