r"""A row becomes prompt token ids; a written answer becomes completion token ids.

    chat template:  [system] [user: instruction + post] <assistant header> + prefill
    none:           {system}\n{instruction} {post}\n{prefill}         (empty parts are left out)

The prefill is raw text behind the assistant header and its tokens belong to the prompt, so a
completion starts where the prefill ends. Only the post is ever shortened: at its end, by whole
characters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from crpo_fast.batch import Row


@dataclass(frozen=True, slots=True)
class PromptIds:
    """Prompt tokens, prefill included, and how many tokens the shortening of the post took away."""

    ids: list[int]
    truncated_tokens: int


def _join(first: str, second: str, separator: str) -> str:
    if not first or not second:
        return first or second
    return first + second if first[-1].isspace() else first + separator + second


def _append_prefill(header: str, prefill: str) -> str:
    """Header and prefill, without repeating what the header ends in (some open ``<think>``)."""
    overlap = next((n for n in range(len(prefill), 0, -1) if header.endswith(prefill[:n])), 0)
    return header + prefill[overlap:]


def render_prompt(row: Row, tokenizer: Any, *, system: str, prefill: str) -> str:
    """The whole prompt as text, nothing shortened."""
    question = _join(row.instruction, row.text, " ")
    if not getattr(tokenizer, "chat_template", None):
        return _join(_join(system, question, "\n"), prefill, "\n")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return _append_prefill(text, prefill)


def _leading_bos(tokenizer: Any) -> list[int]:
    """The bos token where the tokenizer puts one before plain text (a template writes its own)."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or getattr(tokenizer, "chat_template", None):
        return []
    return [bos] if list(tokenizer("", add_special_tokens=True)["input_ids"])[:1] == [bos] else []


def _encode(text: str, tokenizer: Any, **options: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, **options)["input_ids"])


def _encoder(row: Row, tokenizer: Any, system: str, prefill: str) -> Callable[[str], list[int]]:
    """A function from the post (or its beginning) to the ids of the whole prompt.

    A post that spells a special token (``<|im_end|>``) must not end the user's turn: it is encoded
    apart, as plain characters. All other prompts are encoded in one piece.
    """
    bos = _leading_bos(tokenizer)
    hostile = any(token in row.text for token in getattr(tokenizer, "all_special_tokens", ()))

    def render(text: str) -> str:
        return render_prompt(_with_text(row, text), tokenizer, system=system, prefill=prefill)

    if not hostile:
        return lambda text: bos + _encode(render(text), tokenizer)
    marker = "\x02post\x03"
    before, after = render(marker).split(marker)
    head, tail = _encode(before.rstrip(" "), tokenizer), _encode(after, tokenizer)
    space = before[len(before.rstrip(" ")) :]
    return lambda text: (
        bos + head + _encode(space + text, tokenizer, split_special_tokens=True) + tail
    )


def _with_text(row: Row, text: str) -> Row:
    return Row(text, row.label, row.instruction, row.dataset_id)


def build_prompt(
    row: Row, tokenizer: Any, *, system: str, prefill: str, max_length: int
) -> PromptIds:
    r"""Token ids of the prompt of one row, at most ``max_length`` of them.

    Args:
        row: text and instruction are used.
        tokenizer: a transformers tokenizer; its chat template is used when it has one.
        system: system prompt; "" leaves it out.
        prefill: text the answer starts with, e.g. "<think>\n<stimulus>"; "" for none.
        max_length: tokens, prefill included.

    Returns:
        The ids, and the number of tokens lost to shortening the post (0 when it fits).

    Raises:
        ValueError: system prompt, instruction and prefill alone are longer than ``max_length``.
    """
    encode = _encoder(row, tokenizer, system, prefill)
    ids = encode(row.text)
    if len(ids) <= max_length:
        return PromptIds(ids, 0)
    fixed = encode("")
    if len(fixed) > max_length:
        raise ValueError(
            f"max_length: expected at least {len(fixed)} tokens (system prompt, instruction and "
            "prefill alone, "
            f"data set {row.dataset_id!r}), got {max_length}. Raise the prompt length to "
            f"{len(fixed) + 128} or more, or "
            "shorten the system prompt or the instruction; only the post is ever shortened."
        )
    kept = _longest_prefix(row.text, encode, max_length, fixed)
    return PromptIds(kept, len(ids) - len(kept))


def fixed_length(row: Row, tokenizer: Any, *, system: str, prefill: str) -> int:
    """Tokens of a row's prompt that no shortening can spare: all but its post."""
    return len(_encoder(row, tokenizer, system, prefill)(""))


def _longest_prefix(
    text: str, encode: Callable[[str], list[int]], max_length: int, fixed: list[int]
) -> list[int]:
    """Ids with the longest beginning of ``text`` that fits, by bisection over its characters."""
    low, high, best = 0, len(text), fixed
    while high - low > 1:
        middle = (low + high) // 2
        ids = encode(text[:middle])
        if len(ids) <= max_length:
            low, best = middle, ids
        else:
            high = middle
    word = text[:low].rsplit(maxsplit=1)
    if len(word) == 2 and not text[low].isspace() and len(word[1]) < 40:
        shorter = encode(text[: low - len(word[1])].rstrip())  # rather no half word at the end
        return shorter if len(shorter) <= max_length else best
    return best


def encode_completion(text: str, tokenizer: Any) -> list[int]:
    """Ids of a written answer (without the prefill), the end token last.

    Raises:
        ValueError: the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer: expected an eos token, got none. Set one, for example: "
            "tokenizer.eos_token = '<|im_end|>'."
        )
    return [*_encode(text, tokenizer), tokenizer.eos_token_id]
