"""What a caller can get wrong, said before any work: the argument, its value, what to type.

Checks that need the values of a tensor run for CPU tensors only, where they are free; on a GPU they
would stop the host. CRPO_CHECK_LABELS=1 in the environment has labels and rows read there as well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from .host import check_not_capturing, on_device
from .spec import IGNORE_INDEX, ObjectiveSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
MAX_VOCAB = 2**31 - 1  # columns of the logits are int32 in the kernels
CHECK_LABELS = "CRPO_CHECK_LABELS"


def check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    """Kinds, shapes, dtypes and devices of the head's tensors.

    Raises:
        ValueError: naming the argument, what it is and what to do.
    """
    tensors = {"hidden": hidden, "weight": weight, "labels": labels}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        check_plain(name, tensor)
        _check_device(name, tensor, hidden)
    if hidden.dim() < 2:
        raise ValueError(
            f"hidden: expected [T, D] (or more leading dimensions), got {list(hidden.shape)}. "
            "Pass one row per token."
        )
    if not hidden.shape[-1]:
        raise ValueError(
            f"hidden: expected D of at least 1 columns, got {list(hidden.shape)}. Pass the states "
            "before lm_head."
        )
    if hidden.dtype not in DTYPES:
        raise ValueError(
            f"hidden: expected float32, bfloat16 or float64, got {hidden.dtype}. Cast hidden "
            "and weight to bfloat16: gradients of a softmax over a vocabulary underflow in float16."
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected [V, {hidden.shape[-1]}] (D of hidden), got {list(weight.shape)}. "
            "Pass lm_head.weight; transpose it if it is [D, V]."
        )
    if weight.shape[0] > MAX_VOCAB:
        raise ValueError(
            f"weight: expected V of at most {MAX_VOCAB} rows (columns of the logits are int32), "
            f"got V = {weight.shape[0]}. Pass the rows of the vocabulary alone: "
            "weight[:vocab_size]."
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight: expected {hidden.dtype} as hidden, got {weight.dtype}. Pass "
            "weight.to(hidden.dtype), or call under torch.autocast."
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(
            f"bias: expected floating [{weight.shape[0]}], one value per row of weight, got "
            f"{bias.dtype} {list(bias.shape)}. Pass lm_head.bias."
        )


def check_plain(name: str, tensor: object) -> None:
    """A tensor that is all here.

    Raises:
        ValueError: something else, or a tensor whose parts are on other ranks.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"{name}: expected a torch.Tensor, got {type(tensor).__name__}. "
            f"Pass torch.as_tensor({name})."
        )
    if hasattr(type(tensor), "full_tensor") and hasattr(type(tensor), "placements"):
        placements = getattr(tensor, "placements", None)
        raise ValueError(
            f"{name}: expected a plain Tensor, got a DTensor with placements {placements}. "
            "Call the loss inside the forward of the module that owns it, where FSDP2 has gathered "
            f"its parameters. {name}.full_tensor() does where nothing needs a gradient, and there "
            "alone: it does not add up the ranks' gradients. A head whose vocabulary is sharded on "
            f"purpose (tensor parallelism): pass {name}.to_local(), process_group and vocab_start."
        )


def _check_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(
            f"{name}: expected a tensor on {hidden.device} as hidden, got {tensor.device}. "
            f"Pass {name}.to(hidden.device)."
        )


def is_checked(tensor: Tensor) -> bool:
    """Whether labels and rows are looked at: on the CPU, elsewhere where the environment asks."""
    return tensor.device.type == "cpu" or os.environ.get(CHECK_LABELS, "") not in ("", "0")


def check_labels(labels: Tensor, num_rows: int, vocab_size: int) -> Tensor:  # [T]
    """``labels`` flat and int64.

    Raises:
        ValueError: not one per row, not integers, or (where they are read) beyond the vocabulary;
            they would be read while a CUDA graph is captured.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels: expected int64 token ids, got {labels.dtype}. Pass labels.long()."
        )
    flat = check_length("labels", labels, num_rows).long()
    if num_rows and is_checked(flat):
        check_not_capturing(
            flat.device,
            f"{CHECK_LABELS}: expected it unset while a CUDA graph is captured, got "
            f"{os.environ.get(CHECK_LABELS)!r}. Check the labels in a call before the capture.",
        )
        is_outside = ((flat < 0) & (flat != IGNORE_INDEX)) | (flat >= vocab_size)
        positions = torch.arange(num_rows, device=flat.device)
        row = torch.where(is_outside, positions, num_rows).amin()  # []
        first, value = torch.stack((row, flat[row.clamp(max=num_rows - 1)])).tolist()  # one read
        if first < num_rows:
            raise ValueError(
                f"labels: expected ids in 0..{vocab_size - 1} or {IGNORE_INDEX}, got {value} at "
                f"row {first}. The weight has V = {vocab_size} rows: pass the head that belongs to "
                f"the tokenizer, or label rows that do not count with {IGNORE_INDEX}."
            )
    return flat


def check_length(name: str, tensor: Tensor, num_rows: int) -> Tensor:  # [T]
    """``tensor`` flat, with one value per row.

    Raises:
        ValueError: another number of values.
    """
    if tensor.numel() != num_rows:
        raise ValueError(
            f"{name}: expected T = {num_rows} values, one per row of hidden, got {tensor.numel()} "
            f"(shape {list(tensor.shape)}). Give every token its own value, e.g. repeat a "
            "sequence's value over its tokens with torch.repeat_interleave."
        )
    return tensor.reshape(-1)


def token_vector(
    name: str, value: Tensor | None, num_rows: int, hidden: Tensor, dtype: torch.dtype
) -> Tensor | None:  # [T]
    """A per-token constant in the dtype of the statistics, cut off from any graph.

    Raises:
        ValueError: not a tensor, another device, or another number of values.
    """
    if value is None:
        return None
    return _token_vector(name, value, num_rows, hidden, dtype)


def _token_vector(
    name: str, value: Tensor, num_rows: int, hidden: Tensor, dtype: torch.dtype
) -> Tensor:  # [T]
    check_plain(name, value)
    _check_device(name, value, hidden)
    if value.is_complex():
        raise ValueError(f"{name}: expected real numbers, got {value.dtype}. Pass {name}.real.")
    return check_length(name, value, num_rows).detach().to(dtype)


def check_temperature(
    temperature: Tensor | float, num_rows: int, hidden: Tensor, dtype: torch.dtype
) -> Tensor | float:
    """A positive float, or ``[T]`` in the dtype of the statistics (whose values are checked later).

    Raises:
        ValueError: not above 0 (NaN is not either), or another number of values.
    """
    if isinstance(temperature, Tensor):
        if temperature.numel() == 1:
            temperature = temperature.reshape(1).expand(num_rows)
        return _token_vector("temperature", temperature, num_rows, hidden, dtype)
    if not (is_number(temperature) and temperature > 0):
        raise ValueError(
            "temperature: expected a tensor [T] or a finite number above 0, got "
            f"{temperature!r}. Pass the temperature that the tokens were sampled with; greedy "
            "sampling has no finite log-probabilities."
        )
    return float(temperature)


def check_temperatures(temperature: Tensor | float) -> None:
    """The temperatures of the counted rows.

    Raises:
        ValueError: one of them is not above 0, or not finite.
    """
    if isinstance(temperature, Tensor) and temperature.device.type == "cpu":
        is_bad = ~((temperature > 0) & temperature.isfinite())
        if bool(is_bad.any()):
            raise ValueError(
                "temperature: expected finite values above 0, got "
                f"{float(temperature[is_bad][0])}. Pass the temperature that each token was "
                "sampled with."
            )


def is_number(value: object) -> bool:
    """A finite number; no tensor, which would have to be read (and has no gradient here)."""
    return isinstance(value, Real) and math.isfinite(value)


def check_scale(logit_scale: float, logit_softcap: float | None) -> None:
    """Logit scale and soft cap.

    Raises:
        ValueError: out of range.
    """
    if not (is_number(logit_scale) and logit_scale != 0):
        raise ValueError(
            f"logit_scale: expected a finite number other than 0, got {logit_scale!r}. "
            "Pass a Python number, 1.0 for none."
        )
    if logit_softcap is not None and not (is_number(logit_softcap) and logit_softcap > 0):
        raise ValueError(
            f"logit_softcap: expected a finite number above 0 or None, got {logit_softcap!r}. "
            "Pass a Python number, None for none."
        )


def counted_rows(rows: Tensor | Sequence[int] | None, labels: Tensor) -> Tensor | None:  # [n]
    """Indices of the rows that count, None when all do. Without ``rows`` a GPU synchronises here.

    ``rows`` that the host knows to be all of them cost no copy of hidden states; ``range(T)`` says
    so at no cost.

    Raises:
        ValueError: no indices; beyond T or twice (where the host has them); none while a CUDA
            graph is captured.
    """
    if rows is None:
        check_not_capturing(
            labels.device,
            "rows: expected a tensor of indices while a CUDA graph is captured, got None, which "
            "asks the device. Pass (labels != -100).nonzero() made before the capture.",
        )
        return _labelled_rows(labels)
    indices = None  # all rows
    if not (isinstance(rows, range) and rows == range(labels.numel())):
        indices = _indices(rows)  # [n]
        if indices.numel() and (indices.dtype == torch.bool or indices.is_floating_point()):
            raise ValueError(
                f"rows: expected integer indices, got {indices.dtype}. Pass mask.nonzero() of a "
                "mask."
            )
        indices = indices.long()
        if is_checked(indices) and _are_all_rows(indices, labels.numel()):
            indices = None
    if labels.device.type == "cpu":
        return _labelled_rows(labels) if indices is None else _labelled_of(indices, labels)
    if indices is not None:
        indices = on_device("rows", indices, labels.device)
    if is_checked(labels):
        _check_labelled(indices, labels)
    return indices


def _indices(rows: Tensor | Sequence[int]) -> Tensor:  # [n]
    try:
        return torch.as_tensor(rows).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:  # torch says of what it cannot make one
        raise ValueError(
            f"rows: expected integer indices, got {type(rows).__name__} {str(rows)[:40]!r}. Pass "
            f"(labels != {IGNORE_INDEX}).nonzero() made on the host, or a list of row numbers."
        ) from error


def _labelled_rows(labels: Tensor) -> Tensor | None:  # [n]
    counted = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # [n]
    return None if counted.numel() == labels.numel() else counted


def _labelled_of(indices: Tensor, labels: Tensor) -> Tensor:  # [n]
    return indices[labels[indices] != IGNORE_INDEX]


def _are_all_rows(indices: Tensor, num_rows: int) -> bool:
    """Whether ``indices``, whose values the host can see, are all rows in their order.

    Raises:
        ValueError: they are not distinct rows of ``0..num_rows - 1``.
    """
    if not indices.numel():
        return not num_rows
    low, high = (int(v) for v in torch.aminmax(indices))
    is_rising = bool((indices[1:] > indices[:-1]).all())
    if (
        low < 0
        or high >= num_rows
        or not (is_rising or indices.unique().numel() == indices.numel())
    ):
        raise ValueError(
            f"rows: expected distinct indices in 0..{num_rows - 1}, got values in {low}..{high}. "
            f"Pass (labels != {IGNORE_INDEX}).nonzero() made on the host."
        )
    return is_rising and indices.numel() == num_rows


def _check_labelled(indices: Tensor | None, labels: Tensor) -> None:
    """Every row that is to count has a label; asks the device."""
    counted = labels if indices is None else labels[indices]
    if bool((counted == IGNORE_INDEX).any()):
        place = int((counted == IGNORE_INDEX).nonzero()[0])
        row = place if indices is None else int(indices[place])
        raise ValueError(
            f"rows: expected labelled rows, got row {row} with label {IGNORE_INDEX}. Pass "
            f"(labels != {IGNORE_INDEX}).nonzero() made on the host."
        )


def check_workspace(workspace_bytes: int | None) -> None:
    """The bound on extra memory.

    Raises:
        ValueError: no number above 0.
    """
    if workspace_bytes is None:
        return
    is_number = isinstance(workspace_bytes, int | float) and not isinstance(workspace_bytes, bool)
    if not (is_number and workspace_bytes > 0):
        raise ValueError(
            f"workspace_bytes: expected bytes above 0 or None, got {workspace_bytes!r}. "
            "Pass None for the default."
        )


def check_objective(
    spec: ObjectiveSpec,
    given: dict[str, object],
) -> None:
    """Whether everything the objective needs was given.

    Raises:
        ValueError: naming the missing argument and the option that needs it.
    """
    if not isinstance(spec, ObjectiveSpec):
        raise ValueError(
            f"spec: expected an ObjectiveSpec, got {spec!r}. Pass ObjectiveSpec.preset('crpo')."
        )
    needs = {
        "advantages": (spec.policy != "sft", f"policy={spec.policy!r}"),
        "ref_logprobs": (spec.kl_coef != 0, f"kl_coef={spec.kl_coef}"),
        "rollout_logprobs": (spec.rho_mode is not None, f"rho_mode={spec.rho_mode!r}"),
        "cu_seqlens": (spec.policy == "gspo", "policy='gspo'"),
    }
    remedies = {
        "advantages": "Pass one advantage per token, or ObjectiveSpec.preset('sft')",
        "ref_logprobs": "Pass the reference policy's logprobs, or kl_coef=0",
        "rollout_logprobs": "Pass the sampling engine's logprobs, or rho_mode=None",
        "cu_seqlens": "Pass where the sequences begin and end, [B + 1] from 0 to T",
    }
    for name, (is_needed, option) in needs.items():
        if is_needed and given[name] is None:
            raise ValueError(
                f"{name}: expected a tensor with {option}, got None. {remedies[name]}."
            )
