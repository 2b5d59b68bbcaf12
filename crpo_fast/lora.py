"""LoRA (arXiv 2106.09685) through peft: adapters on the blocks and on lm_head, a frozen base.

    attach         before sharding: peft replaces Linears by ones with an adapter
    head_factors   lm_head's adapter for the loss, which adds it to its own chunks of logits
    switched_off   the base model, which is the KL reference: no second copy
    merged         W + alpha / rank * B A under the names of the plain model, for the export
    write_adapter  the adapters alone, as peft stores them

The base model keeps its dtype and takes no gradient and no optimizer state. peft is imported only
where adapters are attached or written.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from crpo_fast.config import Config, ConfigError, LoraConfig

__all__ = [
    "adapters_among",
    "attach",
    "base_of",
    "check",
    "check_targets",
    "freeze_base",
    "head_factors",
    "merged",
    "plain_model",
    "settings_of",
    "skeleton",
    "stored",
    "switched_off",
    "write_adapter",
]

_NAME = "default"  # peft's name of the only adapter
_MARK = "_crpo_lora"  # attribute of an adapted model: its LoraConfig
_WEIGHTS = "adapter_model.safetensors"


def check(config: Config) -> None:
    """Refuse a run that needs peft where it is not installed; needs no model.

    Raises:
        ConfigError: it is not.
    """
    if config.lora.rank and importlib.util.find_spec("peft") is None:
        raise ConfigError(
            f"lora.rank: expected 0 where peft is not installed, got {config.lora.rank}. Type pip "
            "install peft, or --lora.rank 0."
        )


def check_targets(settings: LoraConfig, model: Any) -> None:
    """``lora.targets`` are Linears of the blocks; ``model`` may be without values.

    Raises:
        ConfigError: which one is not, and which there are; or the blocks have none.
    """
    names = _block_linears(model)
    if not names:
        raise ConfigError(
            f"lora.rank: expected 0 for {type(model).__name__}, whose blocks have no nn.Linear, "
            f"got {settings.rank}. Type --lora.rank 0."
        )
    for target in settings.targets:
        if target not in names:
            (near,) = get_close_matches(target.rpartition(".")[2], names, 1, 0.0)
            advice = f"--lora.targets {near}"
            if target in _head_name(model):
                advice = "--lora.head for lm_head"
            raise ConfigError(
                f"lora.targets: expected some of {', '.join(names)} (Linears of the blocks), got "
                f"{target!r}. Type {advice}."
            )


def skeleton(model_config: Any) -> Any:
    """The model of a transformers config without values: names and shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config)


def attach(
    model: Any, settings: LoraConfig, *, path: str = "", seed: int = 0, is_planned: bool = False
) -> None:
    """Put adapters into ``model`` in place, A random by ``seed`` and B 0: it computes as before.

    Args:
        model: not sharded.
        settings: with a rank above 0.
        path: of the base model, for ``write_adapter``.
        seed: of A.
        is_planned: of fake tensors.

    Raises:
        ConfigError: see ``check_targets``.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    check_targets(settings, model)
    targets = list(settings.targets or _block_linears(model))
    if settings.head:
        targets.append(_head_name(model))
    alpha = settings.alpha
    made = PeftConfig(
        r=settings.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=path or None,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(seed)
        # a tied head is adapted alone, and the export unties it (`plain_model`)
        warnings.filterwarnings("ignore", message=".*tie", category=UserWarning)
        with _unmoved() if is_planned else contextlib.nullcontext():
            inject_adapter_in_model(made, model, _NAME)
    setattr(model, _MARK, settings)


@contextlib.contextmanager
def _unmoved() -> Iterator[None]:
    """Peft moves adapters to the base's device; fake tensors are there, and cannot be moved."""
    own = nn.Module.to
    nn.Module.to = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.to = own  # type: ignore[method-assign]


def settings_of(model: Any) -> LoraConfig | None:
    """The adapters' settings, or None: a model without adapters."""
    found: LoraConfig | None = getattr(model, _MARK, None)
    return found


def freeze_base(model: Any) -> None:
    """Only adapters take a gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def base_of(module: Any) -> Any:
    """The plain Linear of a module that may have an adapter."""
    return getattr(module, "base_layer", module)


def copies_of(module: Any) -> list[Any]:
    """The modules that compute for ``module``: itself, or the copies that peft trains in its place.

    Of peft's ``modules_to_save`` the active copy comes first, the original last.
    """
    trained = getattr(module, "modules_to_save", None)
    if trained is None:
        return [module]
    names = sorted(trained, key=lambda name: name not in module.active_adapters)
    return [*(trained[name] for name in names), module.original_module]


def head_factors(head: Any) -> dict[str, tuple[Tensor, Tensor, float]]:
    """``lora_head`` of the loss: A, B and their scaling; empty without an adapter, or with it off.

    Call it inside the head's forward, where FSDP has gathered what the head owns.
    """
    if base_of(head) is head or head.disable_adapters:
        return {}
    return {
        "lora_head": (head.lora_A[_NAME].weight, head.lora_B[_NAME].weight, head.scaling[_NAME])
    }


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The base model, for passes without gradients."""
    layers: list[Any] = [m for m in model.modules() if base_of(m) is not m]
    for layer in layers:  # peft's own switch also freezes the adapters, under FSDP's feet
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapters_among(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of ``weights`` that train."""
    return {name: value for name, value in weights.items() if ".lora_" in name}


def stored(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds of ``weights``: with adapters, these alone."""
    return weights if settings_of(model) is None else adapters_among(weights)


def merged(weights: dict[str, Tensor], settings: LoraConfig) -> dict[str, Tensor]:
    """Whole weights with adapters -> those of the plain model, in their dtype."""
    scaling, plain = settings.alpha / settings.rank, {}
    for name, value in weights.items():
        if ".lora_" in name:
            continue
        module, dot, kind = name.rpartition(".base_layer.")
        if not dot:
            plain[name] = value
            continue
        down = weights.get(f"{module}.lora_A.{_NAME}.weight")
        if kind == "weight" and down is not None:
            value = value + scaling * (weights[f"{module}.lora_B.{_NAME}.weight"] @ down)
        plain[f"{module}.{kind}"] = value
    return plain


def plain_model(model: Any) -> Any:
    """A model without values as ``merged`` weights want it: a tied head that was adapted is untied.

    The head is E + alpha / rank * B A then, and the embedding stays E.
    """
    config, settings = copy.deepcopy(model.config), settings_of(model)
    if settings is not None and settings.head:
        config.tie_word_embeddings = False
        if (text := config.get_text_config()) is not config:
            text.tie_word_embeddings = False
    plain = skeleton(config)
    plain.generation_config = model.generation_config
    return plain


def write_adapter(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, as `PeftModel.from_pretrained` reads them.

    Args:
        model: adapted.
        weights: whole ones by name, adapters among them.
        folder: an older one there is replaced.

    Raises:
        OSError, SafetensorError: a file could not be written.
    """
    tensors = {
        "base_model.model." + name.replace(f".{_NAME}.", "."): value.contiguous()
        for name, value in adapters_among(weights).items()
    }
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    made = copy.deepcopy(model.peft_config[_NAME])
    made.inference_mode = True
    made.save_pretrained(str(temporary))
    save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def _block_linears(model: Any) -> list[str]:
    """Last names of the Linears of the blocks, each once, in their order."""
    head = model.get_output_embeddings()
    found = (
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    return list(dict.fromkeys(found))


def _head_name(model: Any) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)
