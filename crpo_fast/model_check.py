"""What the fused loss and packed rows take for granted of a model, compared with its own numbers.

    logits = softcap(scale * (hidden W^T + bias))      hidden: what the decoder returns, W: the head
    packed   no sequence of a row sees another one

The config says scale and cap under many names, and a model may do more than its config says. So
``head_options`` runs the model's own way from hidden states to logits and compares: four random
states stand for the decoder, no layer runs. ``check_packing`` costs two forwards of a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from crpo_fast import lora
from crpo_fast.packing import MicroBatch, Sequence, pack

__all__ = ["UnsupportedModelError", "check_packing", "check_rotations", "head_options"]

_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_LARGEST = (0.5, 5.0, 40.0, 200.0)  # largest logit of each random state, before any soft cap
_FORMULA = "logits = softcap(scale * (hidden @ weight.T + bias))"
_ADVICE = "Train a model with such a head, or compute its loss from its own logits."


class UnsupportedModelError(ValueError):
    """The model does something that the fused loss, or a packed row, does not know."""


class _States(BaseModelOutputWithPast):
    """Hidden states alone; a model that asks for anything else gets None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def head_options(model: PreTrainedModel) -> dict[str, float]:
    """Logit scale and softcap of the model under the fused loss's names, compared with its logits.

    Call it before the model is sharded. Weights without numbers (meta, fake) are not compared.

    Args:
        model: a causal LM of transformers. Its forward runs twice, in eval and in train mode,
            with random hidden states [1, 4, D] in place of its decoder; then it is as it was.

    Returns:
        ``logit_scale`` and ``logit_softcap``, where the model has them.

    Raises:
        UnsupportedModelError: from hidden states to logits the model does anything else.

    Example:
        >>> from transformers import GraniteConfig, GraniteForCausalLM
        >>> sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8}
        >>> config = GraniteConfig(
        ...     **sizes, num_hidden_layers=1, num_attention_heads=2, logits_scaling=4.0)
        >>> head_options(GraniteForCausalLM(config))
        {'logit_scale': 0.25}
    """
    kind, config = type(model).__name__, model.config
    if config.get_text_config() is not config:
        raise UnsupportedModelError(
            f"model: expected a model of text alone, got {kind}, whose decoder is one part of it. "
            "Save that part as a model of its own: four lines in docs/integrations.md, Models."
        )
    head = lora.base_of(lora.copies_of(model.get_output_embeddings())[0])
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"model: expected an nn.Linear output head, got {type(head).__name__} in {kind}. "
            f"The fused loss needs {_FORMULA}. {_ADVICE}"
        )
    _check_parameters(model)
    options = _configured(config)
    if not (head.weight.is_meta or isinstance(head.weight, FakeTensor)):
        _compare(model, head, options)
    return options


def _check_parameters(model: Any) -> None:
    """Refuse what belongs neither to the decoder nor to the head: the loss would not train it.

    A bias of 0, a factor of 1 and a layer that is the identity so far show in no logits.
    """
    parts = (model.base_model, model.get_output_embeddings())
    known = {id(parameter) for part in parts for parameter in part.parameters()}
    others = [name for name, value in model.named_parameters() if id(value) not in known]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UnsupportedModelError(
            f"model: expected a decoder, an output head and no other parameters, got "
            f"{', '.join(others[:3])}{more} in {type(model).__name__}, which the fused loss does "
            f"not know. {_ADVICE}"
        )


def _configured(config: Any) -> dict[str, float]:
    options, scale = {}, 1.0
    if getattr(config, "final_logit_softcapping", None):
        options["logit_softcap"] = float(config.final_logit_softcapping)
    for name in _FACTORS:
        scale *= float(getattr(config, name, None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    if scale != 1.0:
        options["logit_scale"] = scale
    return options


@torch.no_grad()
def _compare(model: Any, head: nn.Linear, options: dict[str, float]) -> None:
    """Refuse a model whose logits are others than those of ``options``."""
    kind, weight = type(model).__name__, head.weight
    if isinstance(weight, DTensor) or weight.numel() == 0:
        raise UnsupportedModelError(
            f"model: expected whole weights to compare its logits with, got {kind} already "
            "sharded. Call head_options before the model is sharded."
        )
    scale, cap = options.get("logit_scale", 1.0), options.get("logit_softcap")
    noise = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0))
    hidden = noise.to(weight)  # [4, D]
    logits = linear(hidden, weight).float() * scale  # [4, V]
    largest = logits.abs().amax(1, keepdim=True).clamp(min=1e-6)  # [4, 1]
    hidden = hidden * (largest.new_tensor(_LARGEST)[:, None] / largest).to(weight)
    expected = linear(hidden, weight, head.bias).double() * scale  # [4, V]
    if cap is not None:
        expected = cap * (expected / cap).tanh()
    for is_training in (False, True):  # a dropout before the head shows in training alone
        found = _own_logits(model, hidden, is_training).double()
        difference = _difference(found, expected, 2e-2 if weight.dtype.itemsize == 2 else 1e-3)
        if difference:
            mode = "train" if is_training else "eval"
            raise UnsupportedModelError(
                f"model: expected {_FORMULA} with {_values(options, head)}, as its config says, "
                f"got {difference} from {kind}.forward (model.{mode}()). {_ADVICE}"
            )


def _difference(found: Tensor, expected: Tensor, limit: float) -> str:
    """What is wrong with logits [4, V], or nothing; ``limit`` is relative, of the row's largest."""
    if found.shape != expected.shape:
        return f"logits of shape {list(found.shape[1:])} instead of {list(expected.shape[1:])}"
    errors = (found - expected).abs().amax(1) / expected.abs().amax(1)  # [4]
    if bool((errors <= limit).all()):
        return ""
    row = int(errors.nan_to_num(nan=torch.inf).argmax())
    ratio = float((found[row] * expected[row]).sum() / expected[row].square().sum())
    return (
        f"other ones: of logits up to {float(expected[row].abs().max()):.3g} by this formula its "
        f"own differ by up to {float((found[row] - expected[row]).abs().max()):.3g} (they are "
        f"{ratio:.3g} times as large)"
    )


def _values(options: dict[str, float], head: nn.Linear) -> str:
    cap = f"cap {options['logit_softcap']:g}" if "logit_softcap" in options else "no cap"
    bias = "no bias" if head.bias is None else "a bias"
    return f"scale {options.get('logit_scale', 1.0):g}, {cap}, {bias}"


def _own_logits(model: Any, hidden: Tensor, is_training: bool) -> Tensor:  # [n, D] -> [n, V]
    """What the model's forward makes of hidden states that its decoder is said to have returned."""
    kind, decoder = type(model).__name__, model.base_model
    # not 0, a frequent padding token, whose embedding is zero
    ids = torch.arange(1, 1 + hidden.shape[0], device=hidden.device)[None]
    if decoder is model:
        raise UnsupportedModelError(
            f"model: expected a decoder under {kind}.{model.base_model_prefix}, got none. {_ADVICE}"
        )
    try:
        with _mode(model, is_training), _returning(decoder, hidden[None]) as calls:
            logits = model(input_ids=ids, use_cache=False).logits
    except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as error:
        raise UnsupportedModelError(
            f"model: expected logits made of the decoder's last_hidden_state alone, but "
            f"{kind}.forward failed on it: {error} {_ADVICE}"
        ) from error
    if len(calls) != 1:
        raise UnsupportedModelError(
            f"model: expected {kind}.forward to call {model.base_model_prefix} once, got "
            f"{len(calls)} calls. {_ADVICE}"
        )
    return logits[0]


@contextmanager
def _mode(model: nn.Module, is_training: bool) -> Iterator[None]:
    """Inside, every module is in that mode; afterwards each is in its own again."""
    before = [(module, module.training) for module in model.modules()]
    model.train(is_training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def _returning(decoder: Any, hidden: Tensor) -> Iterator[list[None]]:
    """Inside, ``decoder`` returns ``hidden`` [1, n, D]; every call adds to the list."""
    own, calls = vars(decoder).get("forward"), []

    def forward(*_: Any, **__: Any) -> _States:
        calls.append(None)
        return _States(last_hidden_state=hidden)

    decoder.forward = forward
    try:
        yield calls
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own


@torch.no_grad()
def check_packing(policy: Callable[[MicroBatch, Callable[..., Tensor]], Tensor], kind: str) -> None:
    """Refuse a decoder in which a packed sequence sees the one before it.

    Two sequences in one row, twice: other tokens in the first must leave the hidden states of the
    second as they are. Recurrent layers, and attention that no position ids reach, fail.

    Args:
        policy: ``policy(batch, compute)`` calls ``compute(hidden [R, D], weight, ...)``. Sharded
            ones make collectives in it.
        kind: what the model is called in the message.

    Raises:
        UnsupportedModelError: the second sequence changed, with how much.
    """
    last = Sequence([5], [6, 7, 8], [-1] * 3)
    states = []
    for ids in ([1, 2, 3, 4], [4, 6, 5, 2]):
        first = Sequence(ids[:1], ids[1:], [-1] * 3)
        (batch,) = pack([first, last], 8)
        states.append(policy(batch, lambda hidden, *_, **__: hidden)[3:])  # [3, D]
    moved = float((states[1] - states[0]).double().norm() / states[0].double().norm())
    # the same shapes twice: 0 but for experts, whose groups of rows change (1e-10 in fp32)
    if not moved <= (1e-3 if states[0].dtype.itemsize == 2 else 1e-5):  # NaN is refused, too
        raise UnsupportedModelError(
            f"train.layout: expected a model whose packed sequences do not see each other, got "
            f"{kind}: other tokens in the first of two moved the second one's hidden states by "
            f"{moved:.2%} (rms). Type --train.layout padded."
        )


def check_rotations(config: Any, prompt_tokens: int, completion_tokens: int) -> None:
    """Refuse lengths from which on the longest sequence of a batch changes the rotations of all.

    transformers' ``dynamic`` and ``longrope`` look at the largest position of a call: logprobs of
    rollouts, of packed rows and of sequences alone would be different ones.

    Args:
        config: of transformers.
        prompt_tokens: of the longest prompt.
        completion_tokens: of the longest completion.

    Raises:
        UnsupportedModelError: the sum of both is beyond that length.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    for found in (parameters, *parameters.values()):  # the second: of each type of layer
        kind = found.get("rope_type") if isinstance(found, dict) else None
        if kind not in ("dynamic", "longrope"):
            continue
        limit = config.get_text_config().max_position_embeddings
        if kind == "longrope":
            limit = found["original_max_position_embeddings"]
        if prompt_tokens + completion_tokens > limit:
            rest = limit - prompt_tokens
            advice = (
                f"--rollout.max_tokens {rest}" if rest > 0 else "a lower --data.max_prompt_tokens"
            )
            raise UnsupportedModelError(
                f"rollout.max_tokens: expected prompts and completions of at most {limit} tokens, "
                f"as above it the longest of a batch changes the rotations of all ({kind}), "
                f"got {prompt_tokens} + {completion_tokens}. Type {advice}."
            )
