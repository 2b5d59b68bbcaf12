"""Hides what a completion may have taken from a post, before anything reaches the page.

Without --show-text a report holds no post at all, and of a completion only
    - the tags of the grammar and special tokens in angle brackets,
    - words of `words.SAFE_WORDS` and of the data set's labels,
    - punctuation,
except where three or more words in a row stand in the prompt's post as well. Every other character
is replaced by one block, so that length and place of a word stay visible and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate

from crpo_fast.report.words import SAFE_WORDS

BLOCK = "\u2592"
RUN = 3  # so many words in a row that the post has too are a quotation
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~\s]")  # ASCII


def words_of(text: str) -> list[str]:
    """Words of a text, case-folded."""
    return [match.group().casefold() for match in _WORD.finditer(text)]


def hide(
    tokens: Sequence[str], *, post: str, labels: Iterable[str] = (), tags: Iterable[str] = ()
) -> list[str]:
    """The tokens with everything hidden that is not known to be harmless; lengths stay.

    Args:
        tokens: pieces of the completion, in order.
        post: the prompt's post.
        labels: answers that may be named.
        tags: literal strings that may be shown, such as "<answer>".
    """
    text = "".join(tokens)
    shown = [False] * len(text)
    covered = _show_tags(text, tags, shown)
    safe = SAFE_WORDS.union(*(words_of(label) for label in labels))
    spans = [m.span() for m in _WORD.finditer(text) if not covered[m.start()]]
    words = [text[a:b].casefold() for a, b in spans]
    quoted = _quoted(words, words_of(post))
    for (start, end), word, is_quoted in zip(spans, words, quoted, strict=True):
        shown[start:end] = [word in safe and not is_quoted] * (end - start)
    inside = [False] * len(text)
    for start, end in spans:
        inside[start:end] = [True] * (end - start)
    for i, character in enumerate(text):
        if not inside[i] and not covered[i]:
            shown[i] = bool(_PUNCTUATION.match(character))
    masked = "".join(c if ok else BLOCK for c, ok in zip(text, shown, strict=True))
    ends = list(accumulate(map(len, tokens)))
    return [masked[end - len(token) : end] for token, end in zip(tokens, ends, strict=True)]


def _show_tags(text: str, tags: Iterable[str], shown: list[bool]) -> list[bool]:
    """Marks literal tags as shown; returns which characters they cover."""
    covered = [False] * len(text)
    for tag in tags:
        start = text.find(tag) if tag else -1
        while start >= 0:
            for i in range(start, start + len(tag)):
                shown[i] = covered[i] = True
            start = text.find(tag, start + len(tag))
    return covered


def _quoted(words: list[str], post: list[str]) -> list[bool]:
    """Which words lie in a run of ``RUN`` or more that the post has too."""
    runs = {tuple(post[i : i + RUN]) for i in range(len(post) - RUN + 1)}
    quoted = [False] * len(words)
    for i in range(len(words) - RUN + 1):
        if tuple(words[i : i + RUN]) in runs:
            quoted[i : i + RUN] = [True] * RUN
    return quoted
