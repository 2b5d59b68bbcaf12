"""Models and tokenizers: build, load, refuse with advice, export.

``python -m crpo_fast.models smollm2 <folder>`` makes the small pretrained model, once.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import ERROR, LogRecord, getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from crpo_fast.attention import choose_attention
from crpo_fast.models_build import EOS_TOKEN, PAD_TOKEN, ModelError, build_model, train_tokenizer

__all__ = [
    "EOS_TOKEN",
    "PAD_TOKEN",
    "ModelError",
    "build_model",
    "check_model",
    "choose_attention",
    "eos_ids",
    "export_model",
    "load_model",
    "load_tokenizer",
    "train_tokenizer",
]

_MAKE = "python -m crpo_fast.models smollm2 models/smollm2"
_CLASSES = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def check_model(path: str | Path) -> Any:
    """Refuses what is not the folder (or hub name) of a causal LM, without loading weights.

    Returns:
        The model's config.

    Raises:
        ModelError: no such model, no config, or not a causal LM.
    """
    folder = Path(path)
    if not folder.is_dir() and not _HUB_NAME.fullmatch(str(path)):
        raise ModelError(
            f"model.path: expected a model folder, got {path} (there is none). "
            f"Make one with `{_MAKE}` and type --model.path models/smollm2."
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"model.path: expected a folder with a config.json, got {path} without one. "
            "Give a folder that save_pretrained wrote, such as --model.path <run>/final."
        )
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model.path: expected a model folder or a hub name, got {path}: {_first_line(error)} "
            f"Give a folder on this machine; `{_MAKE}` makes one."
        ) from error
    classes = [config.model_type, *(config.architectures or ())]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not _CLASSES.issuperset(classes[1:]):
        raise ModelError(
            f"model.path: expected a causal language model, got {path} of type "
            f"{' / '.join(classes)}. Give a decoder, such as the one that `{_MAKE}` makes."
        )
    return config


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Loads a tokenizer that has an end token.

    Raises:
        ModelError: there is no tokenizer, or it has no eos id.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model.path: expected a tokenizer in {path}, got: {_first_line(error)} "
            "Copy tokenizer.json and tokenizer_config.json into the folder."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model.path: expected a tokenizer with an eos id, got none in {path}. Completions "
            'would never end; add "eos_token": "<token>" to its tokenizer_config.json.'
        )
    return tokenizer


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    device: str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Loads a causal LM and its tokenizer from a transformers folder, or the hub by "owner/name".

    Args:
        path: the folder or hub name.
        dtype: dtype of the weights; fp32 for training.
        attention: "auto" or an implementation of transformers, see ``choose_attention``.
        device: where the model will run; decides what "auto" means. The model is loaded on the CPU.

    Raises:
        ModelError: see ``check_model`` and ``load_tokenizer``; also weights that are missing, or a
            tokenizer with more ids than the model has embeddings.
    """
    config = check_model(path)
    tokenizer = load_tokenizer(path)
    try:
        with _quietly():
            model, report = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=choose_attention(attention, device, model_config=config)[0],
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"model.path: expected loadable weights in {path}, got: {_first_line(error)} "
            f"Copy model.safetensors into the folder, or make a model with `{_MAKE}`."
        ) from error
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ModelError(
            f"model.path: expected all weights in {path}, got none for {len(names)} parameters "
            f"({names[0]}, ...). Give the folder of a whole model."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"model.path: expected a tokenizer with at most {rows} ids (rows of the embedding), "
            f"got {len(tokenizer)} in {path}. Copy the model's own tokenizer into the folder."
        )
    return model, tokenizer


def eos_ids(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Returns all ids that end a completion, sorted: the generation config's and the tokenizer's.

    Raises:
        ModelError: there is none.
    """
    found: set[int] = set()
    settings = getattr(model, "generation_config", None)
    for value in (getattr(settings, "eos_token_id", None), tokenizer.eos_token_id):
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    if not found:
        raise ModelError(
            "tokenizer: expected an eos id, got none in tokenizer and generation config. "
            'Add "eos_token": "<token>" to tokenizer_config.json.'
        )
    return tuple(sorted(found))


def export_model(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    state_dict: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> Path:
    """Writes a transformers folder (safetensors, config, tokenizer), whole or not at all.

    Args:
        model: the model; its own weights may be sharded when ``state_dict`` is given.
        tokenizer: goes into the same folder.
        folder: where to; an earlier export there is replaced.
        state_dict: full weights by name; None: the model's own.
        dtype: floating dtype on disk; None: as they are.
        card: text of README.md; None: there is none.

    Returns:
        ``folder``.

    Raises:
        ModelError: the config ties head and embedding, and they differ.
    """
    folder = Path(folder)
    weights = dict(model.state_dict() if state_dict is None else state_dict)
    if model.config.tie_word_embeddings:
        _drop_tied_head(weights, model)
    if dtype is not None:
        weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
    stored = next(iter(weights.values())).dtype
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with _quietly():
        model.save_pretrained(temporary, state_dict=weights)  # empties the dictionary
    tokenizer.save_pretrained(temporary)
    _write_dtype(temporary / "config.json", stored)
    if card is not None:
        (temporary / "README.md").write_text(card, encoding="utf-8")
    for file in temporary.glob("*.safetensors"):  # written for the owner alone
        file.chmod((temporary / "config.json").stat().st_mode)
    _replace(temporary, folder)
    return folder


def _drop_tied_head(weights: dict[str, Tensor], model: Any) -> None:
    """Removes the head's copy of the embedding; loaded back, a pair would no longer be tied."""
    embedding = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is embedding)
    head = weights.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, weights[name]):
        raise ModelError(
            f"state_dict: expected lm_head.weight equal to {name}, as the config ties them, got "
            "different values. Set tie_word_embeddings = false in the model's config."
        )


def _write_dtype(file: Path, dtype: torch.dtype) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _replace(temporary: Path, folder: Path) -> None:
    """Renames ``temporary`` to ``folder``; an older folder is moved away first, deleted last."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars, and no word about the GPU from deepspeed, which accelerate imports."""
    shown, deepspeed = logging.is_progress_bar_enabled(), getLogger("DeepSpeed")
    logging.disable_progress_bar()
    deepspeed.addFilter(_is_error)
    try:
        yield
    finally:
        deepspeed.removeFilter(_is_error)
        if shown:
            logging.enable_progress_bar()


def _is_error(record: LogRecord) -> bool:
    return record.levelno >= ERROR


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line ``smollm2 <folder>``; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2 or arguments[0] != "smollm2":
        print("usage: python -m crpo_fast.models smollm2 <folder>", file=sys.stderr)
        return 2
    from crpo_fast.smollm2 import convert

    try:
        print(convert(Path(arguments[1])))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
