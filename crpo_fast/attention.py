"""Attention of packed rows with plain torch: ``sdpa_packed``, an implementation for transformers.

A packed row holds many sequences; position ids restart at 0. transformers' ``sdpa`` computes the
whole [T, T] matrix of such a row under a mask. Here every sequence is a causal call of its own: the
same numbers, sum of len_i^2 instead of T^2 work, and no mask. A prompt may stand once before
several completions, each of which sees it and itself. Decoding on a CPU has a path of its own;
padded batches and sliding windows go to ``sdpa`` unchanged.

sdpa has no soft cap of scores (Gemma 2): ``packed_softcap`` is the same with plain products.

After importing this module, models load with ``attn_implementation="sdpa_packed"``.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from crpo_fast.config_file import ConfigError

__all__ = [
    "PACKED_SOFTCAP",
    "SDPA_PACKED",
    "check_attention",
    "choose_attention",
    "flash_bounds",
    "moved",
    "segments",
    "sequence_lengths",
]

SDPA_PACKED = "sdpa_packed"
PACKED_SOFTCAP = "packed_softcap"  # models without sdpa refuse every name with "sdpa" in it


def choose_attention(
    requested: str = "auto",
    device: str = "cpu",
    compute_dtype: str = "bfloat16",
    model_config: Any = None,
) -> tuple[str, str]:
    """Returns the attention implementation and the reason for it.

    ``auto`` is the newest installed flash attention on CUDA where ``compute_dtype`` (of the config)
    is one that it takes and the model is one that it can serve, ``sdpa_packed`` everywhere else.

    Args:
        requested: "auto" or an implementation of transformers.
        device: where the model will run.
        compute_dtype: of its activations.
        model_config: of transformers; None: of a model that sdpa can serve.
    """
    name, reason = _choice(requested, device, compute_dtype)
    if model_config is None or requested not in ("auto", SDPA_PACKED):
        return name, reason
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
    if name != SDPA_PACKED:
        if getattr(architecture, "_supports_flash_attn", True):
            return name, reason
        reason = f"sdpa, as transformers has no flash attention for {model_config.model_type}"
        name = SDPA_PACKED
    if getattr(model_config, "attn_logit_softcapping", None):
        return PACKED_SOFTCAP, "plain products, as sdpa has no soft cap of scores"
    if not getattr(architecture, "_supports_sdpa", True):
        return "eager", f"sdpa cannot serve {model_config.model_type} in transformers"
    return name, reason


def check_attention(requested: str, device: str) -> None:
    """Refuse a ``model.attention`` that cannot run, before a model is made.

    Args:
        requested: "auto", an implementation of transformers, or of a kernel repository (a/b).
        device: where the model will run.

    Raises:
        ConfigError: transformers has no such implementation, or flash attention without CUDA.
    """
    known = ["auto", "eager", *AttentionInterface().valid_keys()]
    if "/" not in requested and requested not in known:
        raise ConfigError(
            f"model.attention: expected one of {', '.join(known)}, got {requested!r}. Type "
            "--model.attention auto."
        )
    if requested.startswith("flash_attention") and not device.startswith("cuda"):
        raise ConfigError(
            f"model.attention: expected one that runs on {device}, got {requested!r}, which needs "
            "a GPU. Type --model.attention auto."
        )


def _choice(requested: str, device: str, compute_dtype: str) -> tuple[str, str]:
    if requested != "auto":
        return requested, "asked for by model.attention"
    if not device.startswith("cuda"):
        return SDPA_PACKED, f"sdpa, as flash attention does not run on {device}"
    if compute_dtype != "bfloat16":
        return SDPA_PACKED, f"sdpa, as flash attention takes bfloat16 and not {compute_dtype}"
    for version, package in ((3, "flash_attn_3"), (2, "flash_attn")):
        if find_spec(package) is not None:
            return f"flash_attention_{version}", f"the package {package} is installed"
    return SDPA_PACKED, 'sdpa, as no flash attention is installed (pip install "crpo-fast[flash]")'


def _attention(
    module: nn.Module,
    query: Tensor,  # [B, H, T, d]
    key: Tensor,  # [B, H_kv, S, d]
    value: Tensor,  # [B, H_kv, S, d]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a packed row; returns [B, T, H, d]."""
    is_row = query.shape[0] == 1 and query.shape[2] == key.shape[2] and position_ids is not None
    if softcap is not None:
        lengths = sequence_lengths(position_ids) if is_row else [query.shape[2]]
        options = (scaling or query.shape[3] ** -0.5, softcap, dropout)
        return _capped(query, key, value, attention_mask, lengths, options), None
    if query.shape[2] == 1 and query.device.type == "cpu" and dropout == 0.0:
        return _decode(query, key, value, attention_mask, scaling), None
    is_packed = is_row and attention_mask is None
    parts = segments(position_ids) if is_packed else [(0, query.shape[2])]
    if len(parts) == 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    return _by_segment(query, key, value, parts, dropout, scaling), None


def _by_segment(
    query: Tensor,  # [1, H, T, d]
    key: Tensor,  # [1, H_kv, T, d]
    value: Tensor,  # [1, H_kv, T, d]
    parts: list[tuple[int, int]],
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """A call for each of ``parts`` (see `segments`); returns [1, T, H, d]."""
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": True}
    lengths = [length for _, length in parts]
    slices = (tensor.split(lengths, 2) for tensor in (query, key, value))
    outputs, prompt = [], None
    for (first, length), q, k, v in zip(parts, *slices, strict=True):
        if first == 0 or prompt is None:
            prompt = k, v
            outputs.append(scaled_dot_product_attention(q, k, v, is_causal=True, **options))
            continue
        k = torch.cat([prompt[0][:, :, :first], k], 2)  # [1, H_kv, first + length, d]
        v = torch.cat([prompt[1][:, :, :first], v], 2)
        mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).tril(first)
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()  # [1, T, H, d]


def _decode(
    query: Tensor,  # [B, H, 1, d]
    key: Tensor,  # [B, H_kv, S, d]
    value: Tensor,  # [B, H_kv, S, d]
    attention_mask: Tensor | None,  # broadcastable to [B, H_kv, 1, S]; bool, or added to the scores
    scaling: float | None,
) -> Tensor:
    """Attention of one new token, [B, 1, H, d]: plain products are faster than sdpa on a CPU.

    64 rows, 9 heads on 3, 200 keys, bf16: 0.9 ms; sdpa 2.7 ms, with enable_gqa 12 ms.
    """
    batch, heads, _, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, dim)  # [B, H_kv, H / H_kv, d]
    scores = (grouped @ key.transpose(2, 3)).float() * (scaling or dim**-0.5)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    elif attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1).to(value.dtype) @ value).reshape(batch, 1, heads, dim)


def _capped(
    query: Tensor,  # [B, H, T, d]
    key: Tensor,  # [B, H_kv, S, d]
    value: Tensor,  # [B, H_kv, S, d]
    mask: Tensor | None,  # [B, 1, T, S] bool; None: causal
    lengths: list[int],  # of the sequences of a packed row; [T] otherwise
    options: tuple[float, float, float],  # scaling, softcap, dropout
) -> Tensor:
    """Attention with softcap * tanh(score / softcap) for scores, [B, T, H, d]; n^2 H a sequence."""
    scaling, softcap, dropout = options
    is_packed = len(lengths) > 1
    outputs, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        columns = rows if is_packed else slice(None)
        q, k, v = query[:, :, rows], key[:, :, None, columns], value[:, :, None, columns]
        grouped = q.unflatten(1, (key.shape[1], -1))  # [B, H_kv, H / H_kv, n, d]
        scores = grouped @ k.transpose(3, 4)  # [B, H_kv, H / H_kv, n, m]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * (scaling / softcap)
        scores = scores.tanh() * softcap
        if mask is None:
            n, m = scores.shape[-2:]
            seen = scores.new_ones(n, m, dtype=torch.bool).tril(m - n)
        else:
            seen = mask[:, :, None, rows, columns]
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)  # padding sees nothing
        outputs.append(torch.dropout(scores.softmax(-1), dropout, True).to(v.dtype) @ v)
        start += length
    return torch.cat(outputs, 3).flatten(1, 2).transpose(1, 2).contiguous()


_known = WeakTensorKeyDictionary()  # position ids -> (their version, segments)


def segments(position_ids: Tensor) -> list[tuple[int, int]]:
    """(first position, length) of each run in which ``position_ids`` [1, T] count on.

    A run from 0 on is a sequence. One from p > 0 on is another continuation of the first p tokens
    of the last such sequence.

    All layers of a forward ask with the same tensor; answers are kept as long as their tensors, so
    that a forward waits for the device once, and never where ``moved`` has told the answer.
    """
    found = _known.get(position_ids)
    if found is not None and found[0] == position_ids._version:
        return found[1]
    row = position_ids[0]
    starts = torch.cat([row.new_zeros(1), (row[1:] != row[:-1] + 1).nonzero().squeeze(1) + 1])
    first, starts = torch.stack([row[starts], starts]).tolist()  # the host waits once
    ends = [*starts[1:], row.shape[0]]
    parts = [(p, end - start) for p, start, end in zip(first, starts, ends, strict=True)]
    _known[position_ids] = (position_ids._version, parts)
    return parts


def sequence_lengths(position_ids: Tensor) -> list[int]:
    """Lengths of the sequences in ``position_ids`` [1, T].

    Raises:
        ValueError: completions share a prompt.
    """
    parts = segments(position_ids)
    if any(first for first, _ in parts):
        raise ValueError(
            "position_ids: expected whole sequences, got prompts that several completions share. "
            f"Type --train.layout packed, or --model.attention {SDPA_PACKED}."
        )
    return [length for _, length in parts]


def flash_bounds(implementation: str, position_ids: Tensor) -> dict[str, Any]:
    """Where the sequences of ``position_ids`` [1, T] are, for flash attention; {} for any other.

    Without it every layer works it out from the position ids, and waits for the device each time.
    """
    if "flash" not in implementation:
        return {}
    lengths, device = sequence_lengths(position_ids), position_ids.device
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)  # [B + 1]
    if device.type == "cuda":
        bounds = bounds.pin_memory()
    bounds = bounds.to(device, non_blocking=True)
    longest = max(lengths)
    return {
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds),
        **dict.fromkeys(("max_length_q", "max_length_k"), longest),
    }


def moved(position_ids: Tensor, copy: Tensor) -> None:
    """``copy`` is ``position_ids`` [1, T] on a device: what the host knows need not be asked."""
    _known[copy] = (copy._version, segments(position_ids))


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """No mask for one packed (or plain) row; sdpa's mask otherwise."""
    windowed = local_size is not None and kv_length > local_size
    if batch_size == 1 and q_length == kv_length and attention_mask is None and not windowed:
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )


for _name in (SDPA_PACKED, PACKED_SOFTCAP):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _mask)
