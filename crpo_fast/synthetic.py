"""Made-up posts with a planted rule, for all eight tasks in the official layout.

The rule (an appraisal in Lazarus' sense) counts three signs in a post: something is at stake
(threat), nobody helps (no resources), the writer is in distress (reaction). The label of 0, 1, 2 or
3 signs is the task's (``synthetic_phrases.TASKS``); no single cue decides it. One cue may be told
with a conflict, so that the same words mean one thing or the other: help that was promised and
never came, "at first ... but now ...", "... even if they say ...".

Splits: train, val and cold_start are drawn from the same combinations of phrases and share no post;
the test split uses combinations that occur nowhere else, made of the same words.

The written rationales (``cold_start.jsonl``) come from a *biased annotator*: where a post mentions
help, he overlooks it with probability ``bias`` and reasons on from there. A model trained on them
decodes greedily what he would usually write, which is wrong wherever the help mattered, while a
third of its samples are right. That is the situation of model-written rationales, and what
reinforcement learning against the gold rule can mend. Symmetric label noise would not do: greedy
decoding is right there.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from crpo_fast import synthetic_phrases as say
from crpo_fast.data_tables import OFFICIAL_EIGHT, DataError

MARKER = "synthetic.json"
_COLUMNS = ("text", "label", "mental_prompt")


@dataclass(frozen=True, slots=True)
class Knobs:
    """What is planted.

    Attributes:
        bias: probability that the annotator overlooks help which a post mentions.
        help_share: share of posts in which somebody does help.
        pivotal: in the two-label tasks, share of posts in which exactly one of threat and distress
            is present, so that help decides the label. (In the others it nearly always does: the
            two are independent there.)
        conflict: share of posts in which one cue is told with a conflict.
    """

    bias: float = 0.62
    help_share: float = 0.5
    pivotal: float = 0.65
    conflict: float = 0.5

    def __post_init__(self) -> None:
        for name in ("bias", "help_share", "pivotal", "conflict"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(
                    f"{name}: expected a share between 0 and 1, got {value}. Give such a number."
                )


@dataclass(frozen=True, slots=True)
class Post:
    """A post and what is true of it."""

    text: str
    gist: str
    who: str
    threat: bool
    help: bool
    distress: bool

    @property
    def signs(self) -> int:
        """0..3 signs by the rule."""
        return self.threat + (not self.help) + self.distress


def gold_label(task: str, threat: bool, helped: bool, distress: bool) -> str:
    """The planted rule."""
    return say.TASKS[task].labels[threat + (not helped) + distress]


def _pick(
    rng: random.Random, first: Sequence[str], second: Sequence[str], held_out: bool
) -> tuple[str, str]:
    """One combination of two slots; a fifth of the table is kept for the test split."""
    while True:
        i, j = rng.randrange(len(first)), rng.randrange(len(second))
        if ((i + 2 * j) % 5 == 0) == held_out:
            return first[i], second[j]


def _clause(rng: random.Random, cue: str, value: bool, held_out: bool) -> tuple[str, str]:
    """(person or "", clause) of one cue, nothing else said."""
    first, second = _pick(rng, *say.CLAUSES[cue, value], held_out)
    person = first if (cue, value) == ("help", True) else ""
    return person, f"my {first} {second}" if person else f"{first} {second}"


def _conflicting(rng: random.Random, cue: str, value: bool, held_out: bool) -> tuple[str, str]:
    """(person or "", clause) that holds both values of a cue; its wording says which is true."""
    if cue == "help" and not value and rng.random() < 1 / 3:
        person, gone = _pick(rng, say.PEOPLE, say.GONE, held_out)
        return "", f"my {person} {gone}"
    person, true = _clause(rng, cue, value, held_out)
    _, other = _clause(rng, cue, not value, held_out)
    return person, rng.choice(say.CONFLICTS).format(true=true, other=other)


def make_post(rng: random.Random, task: str, knobs: Knobs, held_out: bool) -> Post:
    """One post: the event, then a clause for each cue in random order."""
    threat = rng.random() < 0.5
    pivotal = knobs.pivotal if len(set(say.TASKS[task].labels)) == 2 else 0.5
    distress = (not threat) if rng.random() < pivotal else threat
    values = {"threat": threat, "help": rng.random() < knobs.help_share, "distress": distress}
    conflict = rng.choice(list(values)) if rng.random() < knobs.conflict else ""
    clauses, who = [], ""
    for cue, value in values.items():
        write = _conflicting if cue == conflict else _clause
        person, clause = write(rng, cue, value, held_out)
        who = who or person
        clauses.append(clause)
    rng.shuffle(clauses)
    event, gist = rng.choice(say.TASKS[task].events)
    text = " . ".join([f"{event} {rng.choice(say.DAYS)}", *clauses]) + " ."
    return Post(text, gist, who, **values)


def annotate(rng: random.Random, task: str, post: Post, bias: float) -> tuple[dict[str, str], str]:
    """The biased annotator's stages (names of the preset mental_r1) and the label he concludes."""
    sees_help = post.help and rng.random() >= bias
    label = gold_label(task, post.threat, sees_help, post.distress)
    signs = post.threat + (not sees_help) + post.distress
    stages = {
        "stimulus": rng.choice(say.SAY_STIMULUS).format(gist=post.gist),
        "primary_appraisal": rng.choice(say.SAY_THREAT if post.threat else say.SAY_NO_THREAT),
        "secondary_appraisal": rng.choice(say.SAY_HELP if sees_help else say.SAY_NO_HELP).format(
            who=post.who
        ),
        "reaction": rng.choice(say.SAY_DISTRESS if post.distress else say.SAY_CALM),
        "mental_state": rng.choice(say.SAY_STATE).format(count=say.COUNTS[signs], label=label),
    }
    return stages, label


def _posts(
    task: str, split: str, count: int, seed: int, knobs: Knobs, seen: set[str]
) -> Iterator[tuple[random.Random, Post]]:
    """``count`` posts that are not in ``seen`` (which grows), and the generator they came from."""
    rng = random.Random(f"{seed}/{task}/{split}")
    made = 0
    for _ in range(100 * count + 100):
        if made == count:
            return
        post = make_post(rng, task, knobs, held_out=split == "test")
        if post.text not in seen:
            seen.add(post.text)
            made += 1
            yield rng, post
    raise ValueError(
        f"{split}: expected {count} different posts of {task}, got {made}. Ask for fewer rows."
    )


def _write_csv(path: Path, task: str, posts: Iterator[tuple[random.Random, Post]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for _, post in posts:
            label = gold_label(task, post.threat, post.help, post.distress)
            writer.writerow((post.text, label, say.TASKS[task].instruction))


def _write_cold_start(
    path: Path, task: str, posts: Iterator[tuple[random.Random, Post]], bias: float
) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for rng, post in posts:
            stages, label = annotate(rng, task, post, bias)
            row = {
                "text": post.text,
                "label": label,
                "mental_prompt": say.TASKS[task].instruction,
                "stages": stages,
            }
            file.write(json.dumps(row) + "\n")


def _refuse_foreign_files(root: Path, datasets: Sequence[str]) -> None:
    """Real data must not be overwritten by made-up data."""
    if (root / MARKER).is_file():
        return
    for name in datasets:
        if (root / name).is_dir() and any((root / name).iterdir()):
            raise DataError(
                f"{root / name}: expected an empty folder or one that this generator wrote, found "
                "other files. "
                "Choose another root for the made-up data."
            )


def _check_arguments(sizes: dict[str, int], datasets: Sequence[str]) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1 row, got {size}. Use a positive number.")
    for name in datasets:
        if name not in say.TASKS:
            raise ValueError(
                f"datasets: expected names out of {', '.join(say.TASKS)}, got {name!r}. "
                "Use these names."
            )


def write_corpus(
    root: str | Path,
    *,
    seed: int = 0,
    train: int = 200,
    val: int = 25,
    test: int = 40,
    cold_start: int = 1000,
    bias: float = 0.62,
    help_share: float = 0.5,
    pivotal: float = 0.65,
    conflict: float = 0.5,
    datasets: Sequence[str] = OFFICIAL_EIGHT,
) -> dict[str, int]:
    """Writes all splits of the given data sets, the same bytes for the same arguments.

    Args:
        root: folder; made when missing. ``<root>/synthetic.json`` records the arguments.
        seed: of everything random.
        train: rows of each data set, like the next three.
        val: rows.
        test: rows.
        cold_start: rows.
        bias: see ``Knobs``, like the next three.
        help_share: share of posts.
        pivotal: share of posts.
        conflict: share of posts.
        datasets: names out of the eight.

    Returns:
        Rows written per split, over all data sets.

    Raises:
        DataError: the folder holds data that this generator did not write.
        ValueError: a share outside 0..1, an unknown data set, a size below 1, or more rows than
            there are posts.
    """
    root = Path(root)
    knobs = Knobs(bias, help_share, pivotal, conflict)
    sizes = {"train": train, "val": val, "cold_start": cold_start, "test": test}
    _check_arguments(sizes, datasets)
    _refuse_foreign_files(root, datasets)
    for name in datasets:
        (root / name).mkdir(parents=True, exist_ok=True)
        seen: set[str] = set()
        for split, size in sizes.items():
            posts = _posts(name, split, size, seed, knobs, seen)
            if split == "cold_start":
                _write_cold_start(root / name / "cold_start.jsonl", name, posts, knobs.bias)
            else:
                _write_csv(root / name / f"{split}_clean.csv", name, posts)
    record = {"seed": seed, **sizes, **asdict(knobs), "datasets": list(datasets)}
    (root / MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return {split: size * len(datasets) for split, size in sizes.items()}
