"""Published layouts turned into the official one. Here: the stress causes (SAD) of IMHI.

    source/{train,val,test}.csv    columns query, gpt-3.5-turbo
        query            Consider this post: "<post>" Question: What is the stress cause of this
                         post?
        gpt-3.5-turbo    <gold sentence> Reasoning: <one to six sentences>
 -> root/SAD/{train,val,test}_clean.csv and, from the train split, root/SAD/cold_start.jsonl

The reasoning column fills the five stages by the rules of ``cut_reasoning`` (docs/data.md has
examples). A stage holds at most 8 to 12 words, so that with a subword vocabulary, in which the tags
alone take about 50 tokens, a completion stays near 100. Fixed texts stand in where the reasoning
says nothing, and are counted.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from crpo_fast.data_tables import DataError, Record, quoted, read_csv, where

SPLITS = ("train", "val", "test")
QUERY, ANSWER = "query", "gpt-3.5-turbo"
MARKER = " Reasoning:"
_QUERY = re.compile(
    r'Consider this post: "(.*)" Question: What is the stress cause of this post\?\s*', re.DOTALL
)

# What the gold sentence calls each label, and the words by which a conclusion may name it.
GOLD: dict[str, str] = {
    "This post shows the stress cause related to school.": "School",
    "This post shows the stress cause related to financial problem.": "Financial problem",
    "This post shows the stress cause related to family issues.": "Family issues",
    "This post shows the stress cause related to social relationships.": "Social relationships",
    "This post shows the stress cause related to work.": "Work",
    "This post shows the stress cause related to health issues.": "Health issues",
    "This post shows the stress cause related to emotion turmoil.": "Emotional turmoil",
    "This post shows the stress cause related to everyday decision making.": "Everyday decision "
    "making",
    "This post shows other stress causes.": "Other",
}
_NAMES: dict[str, str] = {
    "School": r"school|academic|educat|class",
    "Financial problem": r"financ|money",
    "Family issues": r"famil|parent",
    "Social relationships": r"social|relationship",
    "Work": r"work|\bjob|career|employ",
    "Health issues": r"health",
    "Emotional turmoil": r"emotion",
    "Everyday decision making": r"decision",
    "Other": r"\bothers?\b|unknown|not stated|unspecified|not specified",
}
_STATE: dict[str, str] = {
    label: f"stress caused by {label[0].lower() + label[1:]}" for label in _NAMES
}
_STATE |= {
    "Financial problem": "stress caused by a financial problem",
    "Other": "stress with another cause",
}
INSTRUCTION = (
    "Determine the main cause of stress in the following statement.\n- Respond with one of: "
    + ", ".join(f'"{label}"' for label in _NAMES)
    + ".\nStatement:"
)

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"']?\s+(?=[\"'A-Z])")
_OPENER = re.compile(
    r"(?:The|This) post\s+(?:\w+ly\s+)?"
    r"(?:mentions?|states?|indicates?|expresses|says|describes|suggests?|implies|shows|reveals"
    r"|discusses|talks about|highlights|refers to|specifies)\s+(?:that\s+)?(?P<rest>.+)",
    re.DOTALL,
)
_INFERENCE = re.compile(
    r"\b(?:indicat|suggest|imply|impli)(?:es|s|e|ing)?\s+(?:that\s+)?(?P<rest>.+)", re.DOTALL
)
_RELATION = re.compile(
    r"\b(?P<rest>(?:related|linked|due|tied|attributed|connected) to .+)", re.DOTALL
)
_RESOURCE = re.compile(
    r"\b(?P<rest>(?:lack\w*|unable|inability|cannot|can't|struggl\w*|difficult\w*|challeng\w*"
    r"|support\w*|help\w*|cope|coping|control\w*|manag\w*|resources?|overcom\w*|deal(?:ing)? with"
    r"|balanc\w*)\b.*)",
    re.DOTALL | re.IGNORECASE,
)
_FEELING = re.compile(
    r"\b(?P<rest>(?:feel\w*|overwhelm\w*|anxi\w*|worr\w*|frustrat\w*|pressure\w*|sad\w*|fear\w*"
    r"|scared|upset\w*|anger|angry|confus\w*|distress\w*|exhaust\w*|tired|guilt\w*|lonel\w*"
    r"|nervous\w*|hurt\w*|disappoint\w*|annoy\w*|irritat\w*|concern\w*|uncertain\w*"
    r"|negative emotions?)\b.*)",
    re.DOTALL | re.IGNORECASE,
)
_CONCLUSION = re.compile(
    r"\b(?:label|categor\w*|cause of stress|stress cause|falls? under|therefore|hence|thus)\b",
    re.IGNORECASE,
)
_BREAK = re.compile(
    r"[.;:!?]+(?:\s|$)|,?\s+(?:which|indicating|suggesting|implying)\b"
    r"|,\s+(?:as|but|and|so|causing|making|leading|expressing)\b"
)

_REFUSAL = re.compile(
    r"(?:my )?(?:apolog|sorry|i'?m sorry|i apolog|i can(?:no|')t|as an ai)", re.IGNORECASE
)

FIXED = {
    "primary_appraisal": "a burden for the poster",
    "secondary_appraisal": "no way of coping is mentioned",
    "reaction": "stressed, no other feeling is named",
}
MAX_WORDS = {"stimulus": 12, "primary_appraisal": 12, "secondary_appraisal": 8, "reaction": 8}


def _trim(text: str, max_words: int) -> str:
    """The first clause of ``text``, at most ``max_words`` words, no function word at the cut."""
    words = _BREAK.split(text, maxsplit=1)[0].replace('"', "").split()
    kept = words[:max_words]
    while (
        len(kept) > 1 and len(words) > max_words and kept[-1].strip(",").lower() in _FUNCTION_WORDS
    ):
        kept.pop()
    return " ".join(kept).rstrip(" ,.;:-")


_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the of to in on at by for from with and or but that as is are was their his her its "
        "my such be being which who this these those not also about into than both has have been "
        "having it they",
    )
)


def _first(pattern: re.Pattern[str], sentences: list[str], max_words: int, taken: str = "") -> str:
    """The first trimmed match of two words or more that is not ``taken`` already, or ""."""
    for sentence in sentences:
        for found in pattern.finditer(sentence):
            text = _trim(found["rest"], max_words)
            if " " in text and text != taken:
                return text
    return ""


def cut_reasoning(reasoning: str, post: str, label: str) -> tuple[dict[str, str], dict[str, str]]:
    """Cuts a published reasoning into the five stages of the preset mental_r1.

    Rules, in this order; a clause ends at the next break and is trimmed to ``MAX_WORDS``:
        stimulus             the clause behind "The post mentions (that)" and the like in the
                             first sentence; else the post's first words
        primary_appraisal    the clause behind the first "indicates / suggests / implies (that)";
                             else from "related to / due to" on; else a fixed text
        secondary_appraisal  from the first word about coping on (lack, unable, difficulty,
                             support, help, manage ...), outside sentences about the label;
                             else a fixed text
        reaction             from the first word about a feeling on, outside sentences about the
                             label; else a fixed text
        mental_state         the gold cause, in our words

    Args:
        reasoning: the text behind the marker.
        post: the post.
        label: the gold label.

    Returns:
        (stage -> text, stage -> name of the rule that filled it).
    """
    sentences = _SENTENCE_END.split(reasoning.strip())
    about_post = [s for s in sentences if not _CONCLUSION.search(s)]
    opener = _OPENER.match(sentences[0])
    words = MAX_WORDS
    mentioned = _trim(opener["rest"], words["stimulus"]) if opener else ""
    quoted_post = " ".join(post.replace('"', "").split()[: words["stimulus"]])
    inferred = _first(
        _INFERENCE, about_post + sentences, words["primary_appraisal"], taken=mentioned
    )
    related = _first(_RELATION, sentences, words["primary_appraisal"])
    choices = {
        "stimulus": (("first sentence", mentioned), ("post", quoted_post)),
        "primary_appraisal": (("indicates", inferred), ("related to", related)),
        "secondary_appraisal": (
            ("cue word", _first(_RESOURCE, about_post, words["secondary_appraisal"])),
        ),
        "reaction": (("cue word", _first(_FEELING, about_post, words["reaction"])),),
        "mental_state": (("gold", _STATE[label]),),
    }
    filled = {
        stage: next(
            (rule, text) for rule, text in (*options, ("fixed", FIXED.get(stage, ""))) if text
        )
        for stage, options in choices.items()
    }
    return {k: text for k, (_, text) in filled.items()}, {
        k: rule for k, (rule, _) in filled.items()
    }


def unusable(reasoning: str, label: str) -> str | None:
    """Why a reasoning cannot serve as an example, or None.

    It is empty, it is a refusal to reason, or the last sentence that concludes names causes without
    the gold one.
    """
    if not reasoning.strip():
        return "no reasoning"
    if _REFUSAL.match(reasoning.strip()):
        return "refusal to reason"
    sentences = [s for s in _SENTENCE_END.split(reasoning.strip()) if _CONCLUSION.search(s)]
    named = {
        n
        for n, words in _NAMES.items()
        if sentences and re.search(words, sentences[-1], re.IGNORECASE)
    }
    return "conclusion names another cause" if named and label not in named else None


@dataclass
class Conversion:
    """What was written: rows per split, how often each rule filled each stage, rows left out."""

    rows: dict[str, int] = field(default_factory=dict)
    rules: Counter[tuple[str, str]] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    cold_start: int = 0

    def summary(self) -> str:
        """Lines for a terminal."""
        lines = ["rows: " + ", ".join(f"{split} {count}" for split, count in self.rows.items())]
        lines.append(
            f"cold_start.jsonl: {self.cold_start} rows of the train split; how their stages were "
            "filled:"
        )
        lines += [
            f"  {stage:<20} {rule:<15} {count}" for (stage, rule), count in self.rules.items()
        ]
        lines.append(
            f"left out of the cold start (kept in train_clean.csv): {self.left_out.total()}"
        )
        lines += [f"  {reason:<36} {count}" for reason, count in self.left_out.items()]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Example:
    post: str
    label: str
    reasoning: str


def _parse(path: Path, record: Record) -> _Example:
    question = _QUERY.fullmatch(record.cells[QUERY])
    if question is None or not question[1].strip():
        raise DataError(
            f"{where(path, record.row, record.line, QUERY)}: expected "
            '\'Consider this post: "..." Question: What is '
            f"the stress cause of this post?', got {record.cells[QUERY][:60]!r}. Use the "
            "published file unchanged."
        )
    gold, _, reasoning = record.cells[ANSWER].partition(MARKER)
    if gold.strip() not in GOLD:
        raise DataError(
            f"{where(path, record.row, record.line, ANSWER)}: expected one of the sentences "
            f"{quoted(GOLD)} before "
            f"{MARKER!r}, got {gold[:80]!r}. Use the published file unchanged."
        )
    return _Example(question[1], GOLD[gold.strip()], reasoning)


def _csv_text(examples: list[_Example]) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(("text", "label", "mental_prompt"))
    writer.writerows((e.post, e.label, INSTRUCTION) for e in examples)
    return buffer.getvalue()


def _cold_start_text(examples: list[_Example], conversion: Conversion) -> str:
    lines = []
    for example in examples:
        reason = unusable(example.reasoning, example.label)
        if reason is not None:
            conversion.left_out[reason] += 1
            continue
        stages, rules = cut_reasoning(example.reasoning, example.post, example.label)
        conversion.rules.update(rules.items())
        row = {
            "text": example.post,
            "label": example.label,
            "mental_prompt": INSTRUCTION,
            "stages": stages,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    conversion.cold_start = len(lines)
    conversion.rules = Counter(
        dict(sorted(conversion.rules.items(), key=lambda item: _rule_order(item[0])))
    )
    return "".join(lines)


def _rule_order(key: tuple[str, str]) -> tuple[int, str]:
    return [*MAX_WORDS, "mental_state"].index(key[0]), key[1]


def convert_imhi_sad(source: str | Path, root: str | Path) -> Conversion:
    """Writes ``<root>/SAD`` from the published files; the same bytes every time.

    Args:
        source: folder with train.csv, val.csv and test.csv.
        root: data root; made when missing.

    Returns:
        What was written and counted.

    Raises:
        DataError: a split or a column is missing, a row has another form, or ``<root>/SAD`` already
            holds a file with other content. Nothing is written then.
    """
    source, folder = Path(source), Path(root) / "SAD"
    missing = [f"{split}.csv" for split in SPLITS if not (source / f"{split}.csv").is_file()]
    if missing:
        raise DataError(
            f"{source}: source is missing a split: expected {quoted(missing)}. Check the path."
        )
    conversion, files = Conversion(), {}
    for split in SPLITS:
        path = source / f"{split}.csv"
        examples = [_parse(path, record) for record in read_csv(path, (QUERY, ANSWER))]
        conversion.rows[split] = len(examples)
        files[folder / f"{split}_clean.csv"] = _csv_text(examples).encode()
        if split == "train":
            files[folder / "cold_start.jsonl"] = _cold_start_text(examples, conversion).encode()
    for path, content in files.items():
        if path.exists() and path.read_bytes() != content:
            raise DataError(
                f"{path}: expected no file or the same content, found another. Move it away or "
                "choose another root."
            )
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        path.write_bytes(content)
    return conversion
