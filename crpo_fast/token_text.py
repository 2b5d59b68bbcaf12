"""Where each sampled token lies in the text it stands for, without ever tokenising again.

Sampled ids need not be the split that the tokenizer itself would choose, so offsets are made from
the ids: a table id -> bytes per tokenizer, one join, one running sum of lengths. A tokenizer whose
decoder is not a plain concatenation (WordPiece, words joined by blanks, somebody's own object with
only `decode`) is read through its own `decode`: per token where the pieces add up to the whole,
else prefix by prefix.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

_REPLACEMENT = "\ufffd"
_UNKNOWN = _REPLACEMENT.encode()  # the text of an id that the tokenizer does not know
_METASPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NUM_PROBES = 256


@dataclass(frozen=True, slots=True)
class TokenText:
    """The text of a token sequence and where its tokens end.

    Attributes:
        text: UTF-8 bytes, or characters where the tokenizer is read through `decode`.
        ends: [N] non-decreasing; token i covers ``text[ends[i - 1]:ends[i]]``. Where offsets are
            characters, a token that only begins one is empty; its neighbours still order it.
    """

    text: bytes | str
    ends: list[int] | _PrefixEnds

    def find(self, needle: str) -> int:
        """Offset of the first occurrence of an ASCII ``needle``, or -1."""
        if isinstance(self.text, bytes):
            return self.text.find(needle.encode("ascii"))
        return self.text.find(needle)

    def tokens_within(self, start: int, stop: int) -> tuple[int, int]:
        """Half-open range of the tokens that lie wholly inside ``[start, stop)``."""
        first = bisect_left(self.ends, start) + 1 if start > 0 else 0
        return first, max(first, bisect_right(self.ends, stop))


def read_tokens(token_ids: Iterable[int], tokenizer: Any) -> TokenText:
    """Text and token offsets of ``token_ids``.

    Args:
        token_ids: N ids; a list, tuple, array or tensor.
        tokenizer: a transformers or tokenizers object, or anything with `decode(ids)` or
            `convert_ids_to_tokens(ids)`. What is learnt about it is kept as long as it lives.

    An id beyond the vocabulary, which a head with padded rows may sample, reads as U+FFFD.

    Raises:
        ValueError: an id is negative, or the tokenizer cannot be read at all.
    """
    ids = token_ids.tolist() if hasattr(token_ids, "tolist") else list(token_ids)
    return _reader_of(tokenizer).read(ids, tokenizer)


class _ByteTable:
    """Tokenizers whose text is the concatenation of one byte string per id."""

    def __init__(self, table: list[bytes]) -> None:
        self.table = table

    def read(self, ids: list[int], _tokenizer: Any) -> TokenText:
        table = self.table
        if ids and min(ids) < 0:
            raise _bad_id(ids, ids.index(min(ids)), "ids of 0 or more")
        if ids and max(ids) >= len(table):
            pieces = [table[token] if token < len(table) else _UNKNOWN for token in ids]
        else:
            pieces = [table[token] for token in ids]
        return TokenText(b"".join(pieces), list(accumulate(map(len, pieces))))


class _Decoder:
    """Tokenizers that are read through their own `decode` (or `convert_ids_to_tokens`), exactly."""

    def __init__(self, tokenizer: Any) -> None:
        self.options = _decode_options(tokenizer)
        self.pieces: dict[int, str] = {}

    def read(self, ids: list[int], tokenizer: Any) -> TokenText:
        whole = self.decode(ids, tokenizer)
        for token in set(ids).difference(self.pieces):
            self.pieces[token] = self.decode([token], tokenizer)
        pieces = [self.pieces[token] for token in ids]
        if "".join(pieces) == whole:
            return TokenText(whole, list(accumulate(map(len, pieces))))
        return TokenText(whole, _PrefixEnds(lambda part: self.decode(part, tokenizer), ids, whole))

    def decode(self, ids: list[int], tokenizer: Any) -> str:
        if not ids:
            return ""
        try:
            if hasattr(tokenizer, "decode"):
                return tokenizer.decode(ids, **self.options)
            tokens = tokenizer.convert_ids_to_tokens(ids)
        except (LookupError, ValueError, OverflowError) as error:
            raise ValueError(
                f"token_ids: expected ids that the tokenizer can decode, got {ids[:8]}"
                f"{'...' if len(ids) > 8 else ''} ({error!r}). Use the tokenizer of the model "
                "that sampled them."
            ) from error
        return "".join(_REPLACEMENT if token is None else token for token in tokens)


class _PrefixEnds:
    """``ends`` found lazily, for bisect: the length of what the first i + 1 tokens decode to."""

    def __init__(self, decode: Callable[[list[int]], str], ids: list[int], whole: str) -> None:
        self.decode, self.ids, self.whole = decode, ids, whole

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int, /) -> int:
        if not 0 <= index < len(self.ids):
            raise IndexError(index)
        prefix = self.decode(self.ids[: index + 1])
        if not self.whole.startswith(prefix):  # cut inside a character, or changed by what follows
            pairs = enumerate(zip(prefix, self.whole, strict=False))
            return next((i for i, (a, b) in pairs if a != b), len(self.whole))
        if prefix.endswith(_REPLACEMENT) and index + 1 < len(self.ids):
            prefix = prefix.rstrip(_REPLACEMENT)
        return len(prefix)


_READERS: weakref.WeakKeyDictionary[Any, tuple[int, _ByteTable | _Decoder]] = (
    weakref.WeakKeyDictionary()
)


def _reader_of(tokenizer: Any) -> _ByteTable | _Decoder:
    size = (
        len(tokenizer) if hasattr(tokenizer, "__len__") else -1
    )  # tokens may have been added since
    try:
        known = _READERS.get(tokenizer)
    except TypeError:  # not hashable: nothing to remember it by
        return _make_reader(tokenizer)
    if known is not None and known[0] == size:
        return known[1]
    reader = _make_reader(tokenizer)
    with contextlib.suppress(TypeError):  # cannot be weakly referenced: made again the next time
        _READERS[tokenizer] = (size, reader)
    return reader


def _make_reader(tokenizer: Any) -> _ByteTable | _Decoder:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if all(hasattr(backend, name) for name in ("decoder", "get_vocab", "get_added_tokens_decoder")):
        table = _byte_table(backend)
        if table is not None and _agrees(table, backend):
            return _ByteTable(table)
    if not (hasattr(tokenizer, "decode") or hasattr(tokenizer, "convert_ids_to_tokens")):
        raise ValueError(
            f"tokenizer: expected an object with decode(ids), got {type(tokenizer).__name__}. "
            "Pass the model's own tokenizer, e.g. AutoTokenizer.from_pretrained(folder)."
        )
    return _Decoder(tokenizer)


def _byte_table(backend: Any) -> list[bytes] | None:
    """The bytes of every id, or None where the decoder is not a plain concatenation of bytes."""
    steps = _decoder_steps(backend)
    if steps == {"ByteLevel"}:
        to_bytes = _from_byte_level
    elif steps and steps <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        to_bytes = _from_metaspace_bytes if "ByteFallback" in steps else _from_metaspace
    else:
        return None
    vocab = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values(), default=-1) + 1)  # an id nobody uses has no text
    for token, index in vocab.items():
        table[index] = to_bytes(token)
    for index, added in backend.get_added_tokens_decoder().items():
        table[index] = added.content.encode()  # added tokens are stored as they read
    return table


def _decoder_steps(backend: Any) -> set[str]:
    if backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in state.get("decoders", [state])}


def _agrees(table: list[bytes], backend: Any) -> bool:
    """Whether the table spells a sample of the vocabulary as the tokenizer itself does."""
    added = backend.get_added_tokens_decoder()
    probes = [i for i in range(0, len(table), max(1, len(table) // _NUM_PROBES)) if i not in added]
    probes = [
        i for i in probes if table[i] and _REPLACEMENT not in table[i].decode(errors="replace")
    ]
    spelled = b"".join(table[i] for i in probes).decode()
    return spelled.lstrip() == backend.decode(probes, skip_special_tokens=False).lstrip()


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each of the 256 bytes, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes(map(_BYTE_OF.__getitem__, token))
    except KeyError:  # not of the alphabet: the decoder passes it through as it is
        return token.encode()


def _from_metaspace(token: str) -> bytes:
    return token.replace(_METASPACE, " ").encode()


def _from_metaspace_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _from_metaspace(token)


def _decode_options(tokenizer: Any) -> dict[str, bool]:
    """Keywords that keep `decode` literal, as far as this tokenizer knows them."""
    wanted = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    try:
        parameters = inspect.signature(tokenizer.decode).parameters
    except (AttributeError, TypeError, ValueError):
        return {}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return wanted if hasattr(tokenizer, "all_special_ids") else {}
    return {name: value for name, value in wanted.items() if name in parameters}


def _bad_id(ids: list[int], where: int, expected: str) -> ValueError:
    return ValueError(
        f"token_ids: expected {expected}, got {ids[where]} at position {where}. "
        "Pass the ids as they were sampled, without padding or ignored labels."
    )
