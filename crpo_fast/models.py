"""Models and tokenizers: build a small one, load one, train a tokenizer, export a folder.

python -m crpo_fast.models smollm2 <folder>     a real pretrained 135 M-parameter model, converted once
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from crpo_fast.attention import SDPA_PACKED

__all__ = [
    "EOS_TOKEN",
    "PAD_TOKEN",
    "ModelError",
    "build_model",
    "choose_attention",
    "eos_ids",
    "export_model",
    "load_model",
    "train_tokenizer",
]

EOS_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"
ARCHITECTURES = ("llama", "qwen3")
_SMOLLM2_HINT = "python -m crpo_fast.models smollm2 models/smollm2"


class ModelError(ValueError):
    """A model or tokenizer that cannot be used; the message says what to type."""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, tags: Sequence[str]
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE over whitespace-separated words.

    Punctuation stays with its word, so frequent words with their comma are one token. Every tag is one
    token wherever it occurs and survives decoding. ``decode(encode(text)) == text`` for every text.

    Args:
        texts: the corpus.
        vocab_size: size of the whole vocabulary at most: pad, end, 256 bytes, merges, tags.
        tags: whole tags such as "<think>" and "</think>".

    Returns:
        A tokenizer with pad and end token and without a chat template. The same texts in the same order
        give the same tokenizer.

    Raises:
        ModelError: ``vocab_size`` leaves no room for bytes and tags, or a tag is empty or given twice.
    """
    special = [PAD_TOKEN, EOS_TOKEN]
    if len(set(tags)) != len(tags) or "" in tags or set(tags) & set(special):
        raise ModelError(
            f"tags: expected different, non-empty strings other than {special}, got {list(tags)}."
            " Rename the stages."
        )
    smallest = len(special) + 256 + len(tags)
    if vocab_size < smallest:
        raise ModelError(
            f"vocab_size: expected at least {smallest} (2 special tokens, 256 bytes, {len(tags)} tags),"
            f" got {vocab_size}. Set model.vocab_size = {smallest + 512}."
        )
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?\S+|\s+(?!\S)|\s+"), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(tags),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pattern = re.compile("|".join(map(re.escape, sorted(tags, key=len, reverse=True))) or r"(?!)")
    tokenizer.train_from_iterator((pattern.sub(" ", text) for text in texts), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    architecture: str = "llama",
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    max_positions: int = 2048,
    tie_word_embeddings: bool = True,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    attention: str = "auto",
    device: str = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """Builds a small decoder from a config, with fp32 weights that depend on ``seed`` alone.

    Projections start from N(0, 1/fan_in), those that write into the residual stream divided by
    sqrt(2 num_layers), embeddings from N(0, 1/hidden_size).

    Args:
        architecture: "llama" or "qwen3".
        vocab_size: rows of the embedding; at least len(tokenizer).
        hidden_size: D; a multiple of 2 * num_heads.
        num_layers: decoder blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads; None: num_heads.
        intermediate_size: width of the MLP; None: 8/3 D, rounded up to a multiple of 32.
        max_positions: longest sequence.
        tie_word_embeddings: whether the head is the embedding.
        eos_token_id: end token, written into config and generation config.
        pad_token_id: the same for the padding token.
        attention: "auto" or a transformers implementation, see ``choose_attention``.
        device: where the model will run; decides what "auto" means.
        seed: seed of the initial weights; torch's global random state is left alone.

    Raises:
        ModelError: unknown architecture, or sizes that do not fit each other.
    """
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"model.architecture: expected one of {', '.join(ARCHITECTURES)}, got {architecture!r}."
        )
    if hidden_size % (2 * num_heads) or num_heads % (num_kv_heads or num_heads):
        raise ModelError(
            "model.hidden_size: expected a multiple of 2 * num_heads, and num_heads a multiple of"
            f" num_kv_heads, got hidden_size {hidden_size}, num_heads {num_heads}, num_kv_heads"
            f" {num_kv_heads}. Set for example hidden_size = {64 * num_heads}."
        )
    config = AutoConfig.for_model(
        architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or -(-8 * hidden_size // 96) * 32,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads or num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every GPU
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=choose_attention(attention, device)[0],
        )
        _initialise(model, num_layers)
    return model


@torch.no_grad()
def _initialise(model: nn.Module, num_layers: int) -> None:
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, module.embedding_dim**-0.5)
        elif isinstance(module, nn.Linear) and module is not head:
            std = module.in_features**-0.5
            if name.endswith(("o_proj", "down_proj")):
                std /= (2 * num_layers) ** 0.5
            module.weight.normal_(0.0, std)
    if not model.config.tie_word_embeddings:  # type: ignore[union-attr]
        head.weight.normal_(0.0, head.in_features**-0.5)


def choose_attention(requested: str = "auto", device: str = "cpu") -> tuple[str, str]:
    """Returns the attention implementation and the reason for it.

    ``auto`` is the newest installed flash attention on CUDA, ``sdpa_packed`` everywhere else.
    """
    if requested != "auto":
        return requested, "asked for by model.attention"
    if not device.startswith("cuda"):
        return SDPA_PACKED, f"sdpa, as flash attention does not run on {device}"
    for version, package in ((3, "flash_attn_3"), (2, "flash_attn")):
        if find_spec(package) is not None:
            return f"flash_attention_{version}", f"the package {package} is installed"
    return SDPA_PACKED, 'sdpa, as no flash attention is installed (pip install "crpo-fast[flash]")'


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    device: str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Loads a causal LM and its tokenizer from a transformers folder, or from the hub by "owner/name".

    Args:
        path: the folder or hub name.
        dtype: dtype of the weights; fp32 for training.
        attention: "auto" or a transformers implementation, see ``choose_attention``.
        device: where the model will run; decides what "auto" means.

    Raises:
        ModelError: no such model, not a causal LM, no weights, or a tokenizer without an end token.
    """
    check_model(path)
    tokenizer = load_tokenizer(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=choose_attention(attention, device)[0]
        )
    except OSError as error:
        raise ModelError(
            f"model.path: expected a folder with weights (model.safetensors), got {path}: {error}."
            f" Copy the weights there, or make a model with `{_SMOLLM2_HINT}`."
        ) from error
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise ModelError(
            f"model.path: expected a tokenizer of at most {model.get_input_embeddings().weight.shape[0]}"
            f" ids (rows of the embedding), got {len(tokenizer)} in {path}."
            " Take the tokenizer that belongs to the model."
        )
    return model, tokenizer


def check_model(path: str | Path) -> None:
    """Refuses what is not a causal LM's folder (or hub name), without loading weights.

    Raises:
        ModelError: no such model, or not a causal LM.
    """
    config = _read_config(path)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"model.path: expected a causal language model, got {path} of type {config.model_type!r}."
            f" Take a decoder such as the one of `{_SMOLLM2_HINT}`."
        )


def _read_config(path: str | Path) -> Any:
    folder = Path(path).expanduser()
    hub_name = re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) is not None
    if not folder.is_dir() and not hub_name:
        raise ModelError(
            f"model.path: expected a model folder, got {path} (no such folder)."
            f" Make one with `{_SMOLLM2_HINT}` and set model.path to it."
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"model.path: expected a folder with a config.json, got {path} (it has none)."
            " Set model.path to a folder that save_pretrained wrote, for example <run>/final."
        )
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(
            f"model.path: expected a model folder or a hub name, got {path}: {str(error).splitlines()[0]}"
            f" Set model.path to a folder on this machine, for example one made with `{_SMOLLM2_HINT}`."
        ) from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model.path: expected a tokenizer in {path}, got: {str(error).splitlines()[0]}"
            " Copy tokenizer.json and tokenizer_config.json into the folder."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model.path: expected a tokenizer with an eos id, got none in {path}. Add"
            ' "eos_token": "<token>" to its tokenizer_config.json.'
        )
    return tokenizer


def eos_ids(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Returns every id that ends a completion, sorted: the generation config's and the tokenizer's."""
    found: set[int] = set()
    generation_config = getattr(model, "generation_config", None)
    for value in (getattr(generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    if not found:
        raise ModelError(
            "tokenizer: expected an eos id, got none in the tokenizer and the generation config."
            " Set tokenizer.eos_token."
        )
    return tuple(sorted(found))


def export_model(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes a transformers folder (safetensors, config, tokenizer), whole or not at all.

    Args:
        model: the model; with ``state_dict`` its own weights may be sharded.
        tokenizer: goes into the same folder.
        folder: where to; an earlier export there is replaced.
        state_dict: full weights by name; None: the model's own.
        dtype: dtype on disk; None: as they are.

    Raises:
        ModelError: a tied model whose head and embedding differ.
    """
    folder = Path(folder)
    weights = dict(model.state_dict() if state_dict is None else state_dict)
    if model.config.tie_word_embeddings:
        _drop_tied_head(weights)
    if dtype is not None:
        weights = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in weights.items()
        }
    stored = next(iter(weights.values())).dtype
    temporary = folder.with_name(folder.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary, state_dict=weights)
    tokenizer.save_pretrained(temporary)
    _write_dtype(temporary / "config.json", stored)  # save_pretrained empties the dictionary
    replace_folder(temporary, folder)
    return folder


def _drop_tied_head(weights: dict[str, torch.Tensor]) -> None:
    embedding = next(k for k in weights if k.endswith("embed_tokens.weight"))
    head = weights.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, weights[embedding]):
        raise ModelError(
            f"state_dict: expected lm_head.weight equal to {embedding} (the config ties them), got"
            " different values. Set model.tie_word_embeddings = false."
        )


def _write_dtype(config_file: Path, dtype: torch.dtype) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def replace_folder(temporary: Path, folder: Path) -> None:
    """Puts ``temporary`` in the place of ``folder`` by renaming."""
    old = folder.with_name(folder.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: ``smollm2 <folder>``."""
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
