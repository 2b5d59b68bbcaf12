"""Kernels inside the decoder blocks: liger-kernel's norms, gated MLPs and RoPE, or the model's own.

Liger's losses stay off: the head and its loss are `policy`'s. What Liger patches besides the given
model are the classes and the RoPE of transformers' module of that architecture, for the process.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from crpo_fast.models_build import ModelError

__all__ = ["COMPARED", "choose_block_kernels", "use_liger", "with_block_kernels"]

# model types whose values and gradients with Liger's kernels are compared with plain blocks in the
# tests; "auto" takes no others
COMPARED = (
    *("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "olmo3", "phi3"),
    *("qwen2", "qwen3", "smollm3"),
)
_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
# Liger binds an MLP without a look at the model's activation
_ACTIVATIONS = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh",)}


def choose_block_kernels(
    requested: str, device: str, compute_dtype: str, config: Any
) -> tuple[str, str]:
    """Returns "liger" or "none", and the reason for it.

    Args:
        requested: ``model.block_kernels``.
        device: where the model will run.
        compute_dtype: of the run's config.
        config: of the model, as transformers has it.

    Raises:
        ModelError: Liger is asked for by name and cannot be used.
    """
    if requested == "none":
        return "none", "asked for by model.block_kernels"
    obstacle = _obstacle(device, compute_dtype, config)
    if requested == "auto" and obstacle is None and config.model_type not in COMPARED:
        obstacle = (
            f"Liger's kernels were not compared with {config.model_type}'s own "
            "(--model.block_kernels liger takes them)"
        )
    if obstacle is None:
        found = f"liger-kernel is installed, and compared with {config.model_type}'s own"
        return "liger", found if requested == "auto" else "asked for by model.block_kernels"
    if requested == "liger":
        raise ModelError(
            f"model.block_kernels: expected auto or none here, got 'liger': {obstacle}. Type "
            "--model.block_kernels auto."
        )
    return "none", obstacle


def _obstacle(device: str, compute_dtype: str, config: Any) -> str | None:
    if not device.startswith("cuda"):
        return f"Liger's kernels need a GPU, this is {device}"
    if compute_dtype == "float64":
        return "Liger's kernels compute in float32, not float64"
    if find_spec("liger_kernel") is None:
        return 'no liger-kernel is installed (pip install "crpo-fast[liger]")'
    patch = _patches().get(config.model_type)
    if patch is None:
        return f"liger-kernel does not know the model type {config.model_type}"
    parts = inspect.signature(patch).parameters
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    for part, names in _ACTIVATIONS.items():
        if part in parts and activation not in names:
            return f"Liger's {part} is for {names[0]}, the model's activation is {activation}"
    return None


def _patches() -> Mapping[str, Callable[..., None]]:
    """Model type -> Liger's ``apply_liger_kernel_to_<model type>``."""
    return import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN


def use_liger(model: Any) -> Any:
    """Puts Liger's kernels into the blocks of ``model``, which is returned; its losses stay off."""
    patch = _patches()[model.config.model_type]
    known = inspect.signature(patch).parameters
    patch(model=model, **{name: False for name in _LOSSES if name in known})
    return model


def with_block_kernels(
    build_model: Callable[[], Any], requested: str, device: str, compute_dtype: str
) -> Callable[[], Any]:
    """``build_model`` whose models have the kernels that `choose_block_kernels` chooses.

    Raises (when it is called):
        ModelError: Liger is asked for by name and cannot be used.
    """

    def make() -> Any:
        model = build_model()
        choice, _ = choose_block_kernels(requested, device, compute_dtype, model.config)
        return use_liger(model) if choice == "liger" else model

    return make
