"""Grammars, texts and tokenizers of every kind for the tests of stages."""

import random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from crpo_fast.stages import Stage, StageGrammar

GRAMMAR = StageGrammar.preset("mental_r1")
AB = StageGrammar(stages=(Stage("a", "aa"), Stage("b", "bb")))
CONTENTS = {
    "stimulus": "lost the job; \U0001f622 caf\u00e9",
    "primary_appraisal": "a threat",
    "secondary_appraisal": "friends help",
    "reaction": "fear, \u4e0d\u5b89",
    "mental_state": "stressed",
}
TEXT = GRAMMAR.render(CONTENTS, "Yes")


class ByteTokenizer:
    """One id per byte; only `decode`."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


class WordTokenizer:
    """Pieces by id, joined by blanks; a plain dict and only `decode`."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids):
        return " ".join(self.pieces[i] for i in ids)


class PieceTokenizer:
    """Only `convert_ids_to_tokens`."""

    def __init__(self, pieces):
        self.pieces = pieces

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[i] if i < len(self.pieces) else None for i in ids]


class Joined(PieceTokenizer):
    """Pieces by id, concatenated; unhashable, so nothing can be remembered about it."""

    __hash__ = None
    convert_ids_to_tokens = None

    def decode(self, token_ids, skip_special_tokens=True):
        assert not skip_special_tokens
        return "".join(self.pieces[i] for i in token_ids)


def corpus():
    words = [
        "lost",
        "the",
        "job",
        "a",
        "threat",
        "friends",
        "help",
        "fear",
        "caf\u00e9",
        "stressed",
    ]
    words += ["<think>", "<answer>", "Yes", "No", "\u4e0d\u5b89"]
    rng = random.Random(0)
    return [" ".join(rng.choices(words, k=12)) for _ in range(200)] + [TEXT]


def byte_level(added=()):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return tokenizer


def metaspace():
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    vocab = [(token, 0.0) for token in ["<unk>", "</s>", *bytes_]]
    vocab += [
        (piece, -2.0)
        for piece in ["\u2581", "\u2581the", "\u2581a", "\u2581threat", "th", "e", "r", "a", "t"]
    ]
    vocab += [(piece, -3.0) for piece in "<>/_stimulprybconwdgk"]
    core = Tokenizer(models.Unigram(list(dict(vocab).items()), unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def wordpiece():
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"])
    core.train_from_iterator(corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="[SEP]")
    tags = [tag for stage in GRAMMAR.stages for tag in (stage.open, stage.close)]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return tokenizer


def by_character(text, spans):
    """Oracle: what each character's stage is, from spans given as (needle, stage)."""
    stages = [-1] * len(text)
    for needle, stage in spans:
        at = text.index(needle)
        stages[at : at + len(needle)] = [stage] * len(needle)
    return stages


def ids_of(text, grammar=AB):
    """Stage of every character of an ASCII text."""
    return grammar.stage_ids(text.encode(), ByteTokenizer())
