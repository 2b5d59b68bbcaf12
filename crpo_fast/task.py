"""What is trained on: rows, prompts, stage grammar, tokenizer, rewards; bound once per run."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from crpo_fast import data, rewards, synthetic
from crpo_fast.batch import Row
from crpo_fast.checkpoint_files import whole_folder
from crpo_fast.config import Config, ConfigError
from crpo_fast.distributed import num_cores
from crpo_fast.packing import Sequence
from crpo_fast.prompts import build_prompt, encode_completion, fixed_length
from crpo_fast.reward_pool import InProcessRewards, RewardPool, Scorer
from crpo_fast.scoring import classify
from crpo_fast.stages import Stage, StageGrammar

_MOST_MADE = 16_384  # cold-start sequences that are kept; some KB each


@dataclass(frozen=True)
class Rows:
    """The rows of each purpose. ``cold_start`` rows carry a written completion."""

    train: list[Row]
    test: list[Row]
    cold_start: list[Row] = field(default_factory=list)

    def label_sets(self) -> dict[str, tuple[str, ...]]:
        """Data set -> its labels: the published ones, or those found in the rows."""
        return self._label_sets

    @cached_property
    def _label_sets(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, set[str]] = {}
        for row in (*self.train, *self.test):
            found.setdefault(row.dataset_id, set()).add(row.label)
        return {name: data.LABEL_SETS.get(name, tuple(sorted(s))) for name, s in found.items()}


def load_rows(config: Config, run_dir: Path, *, write: bool) -> Rows:
    """Rows as the config says; ``write`` makes the synthetic corpus in the run folder first."""
    settings = config.data
    needs_cold_start = any(p.algorithm == "sft" for p in config.phases)
    if settings.kind == "table":
        columns = {"prompt": settings.prompt, "answer": settings.answer}
        completion = settings.completion or None
        train = data.load_table(settings.path, **columns, completion=completion)
        test = data.load_table(settings.test_path or settings.path, **columns)
        source = settings.cold_start_path
        cold = data.load_table(source, **columns, completion=completion) if source else train
        return Rows(train, test, cold if needs_cold_start else [])
    root: str | Path = settings.root
    if settings.kind == "synthetic":
        root = run_dir / "data"
        if write and not root.exists():
            sizes = settings.synthetic
            with whole_folder(root) as folder:
                synthetic.write_corpus(
                    folder,
                    seed=config.seed,
                    train=sizes.train,
                    val=sizes.val,
                    test=sizes.test,
                    cold_start=sizes.cold_start,
                    bias=sizes.bias,
                    conflict=sizes.conflict,
                )
    names = settings.datasets or None
    return Rows(
        train=data.load_official(root, "train", names),
        test=data.load_official(root, config.eval.split, names),
        cold_start=data.load_cold_start(root, names) if needs_cold_start else [],
    )


def build_grammar(config: Config) -> StageGrammar:
    """The preset's grammar with the config's ``[[stages]]`` tables and entropy schedule."""
    options = {
        "schedule": config.entropy.schedule,
        "magnitude": config.entropy.magnitude,
        "tau": config.entropy.tau,
        "answer_tag": config.grammar.answer_tag,
    }
    try:
        if config.stages:
            tables = [Stage(s.name, s.tag or s.name, s.instruction, s.coef) for s in config.stages]
            return StageGrammar(stages=tuple(tables), **options)
        if config.grammar.preset == "none":
            return StageGrammar(stages=(), **options)
        return StageGrammar.preset(config.grammar.preset, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@dataclass(frozen=True)
class Task:
    """Rows, tokenizer, grammar and rewards with everything derived from them."""

    rows: Rows
    tokenizer: Any
    grammar: StageGrammar
    system: str
    max_prompt_tokens: int
    scorer: Scorer
    balance_weights: dict[tuple[str, str], float]
    match: str
    balance: str
    max_failed: float  # samples of a rollout, all ranks together
    # cold-start sequences that were made: a later epoch does not tokenise them again
    made: dict[int, tuple[Row, Sequence]] = field(default_factory=dict, repr=False, compare=False)

    def prompt(self, row: Row) -> tuple[list[int], int]:
        """(prompt ids ending in the prefill, tokens cut off the post)."""
        built = build_prompt(
            row,
            self.tokenizer,
            system=self.system,
            prefill=self.grammar.prefill,
            max_length=self.max_prompt_tokens,
        )
        return built.ids, built.truncated_tokens

    def written(self, row: Row) -> Sequence:
        """The cold-start sequence of a row with a written completion."""
        found = self.made.get(id(row))
        if found is not None and found[0] is row:
            return found[1]
        ids = encode_completion(self.written_text(row), self.tokenizer)
        sequence = Sequence(self.prompt(row)[0], ids, self.grammar.stage_ids(ids, self.tokenizer))
        if len(self.made) < _MOST_MADE:
            self.made[id(row)] = (row, sequence)
        return sequence

    def written_text(self, row: Row) -> str:
        """The written completion of a cold-start row."""
        text = row.completion if row.stages is None else self.grammar.render(row.stages, row.label)
        if text is None:
            raise ConfigError(
                f"data: the sft phase needs a written completion, {self.place(row)} has none. Set "
                "data.completion, or add cold_start.jsonl to the data set's folder."
            )
        return text

    def place(self, row: Row) -> str:
        """Where a cold-start row stands; nothing of its text."""
        members = [r for r in self.rows.cold_start if r.dataset_id == row.dataset_id]
        number = next((i for i, r in enumerate(members, start=1) if r is row), 0)
        return f"cold-start row {number} of data set {row.dataset_id}"

    def score(
        self, rows: list[Row], completions: list[str], group_size: int
    ) -> rewards.RewardTable:
        """Rewards of one completion per row; ``group_size`` rows in turn are the same."""
        columns: dict[str, list[Any]] = {
            "answer": [r.label for r in rows],
            "dataset_id": [r.dataset_id for r in rows],
        }
        for name in sorted({name for r in rows for name in r.columns}):
            columns.setdefault(name, [r.columns.get(name) for r in rows])
        posts = [r.text for r in rows]
        return self.scorer.score(posts, completions, columns, group_size, self.max_failed)

    def is_right(self, row: Row, completion: str) -> bool:
        """Whether the completion's answer is the row's, as an evaluation judges it."""
        answer = self.grammar.extract_answer(completion)
        labels = self.rows.label_sets()[row.dataset_id]
        return classify(answer, labels, match=self.match) == row.label

    def decode(self, token_ids: list[int]) -> str:
        """Text of a completion without its end token."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


def load_rewards(config: Config) -> list[Callable[..., Any]]:
    """The functions of ``rewards.functions``."""
    try:
        return [rewards.load_reward(name) for name in config.rewards.functions]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def open_rewards(config: Config) -> Scorer:
    """Who calls the reward functions, to be closed at the end; refuses names that do not exist.

    The workers start here, before anything is loaded. Only they import the functions of others.
    """
    settings = config.rewards
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = settings.workers
    if workers is None:
        workers = max(1, min(4, num_cores() // ranks))
    if workers == 0 or all(p.algorithm == "sft" for p in config.phases):
        return InProcessRewards(load_rewards(config), settings.weights)
    pool = RewardPool(
        settings.functions,
        settings.weights,
        workers=workers,
        timeout=settings.timeout,
        start_timeout=settings.start_timeout,
    )
    try:
        if all(name.startswith("crpo_fast.rewards:") for name in settings.functions):
            load_rewards(config)  # known here: no need to wait
        else:
            pool.wait_ready()
    except rewards.RewardError as error:
        pool.close()
        raise ConfigError(str(error)) from error
    except BaseException:
        pool.close()
        raise
    return pool


def build_task(config: Config, rows: Rows, tokenizer: Any, scorer: Scorer | None = None) -> Task:
    """Bind the parts; fails early where a phase would fail late."""
    grammar = build_grammar(config)
    settings, rollout = config.rewards, config.rollout
    scorer = scorer or InProcessRewards(load_rewards(config), settings.weights)
    pairs = [(r.dataset_id, r.label) for r in rows.train]
    balance = rewards.balance_weights(pairs)
    scorer.bind(
        grammar=grammar,
        match=settings.match,
        balance_weights=balance if settings.balance == "reward" else None,
    )
    system = config.data.system or grammar.system_prompt()
    return Task(
        rows=rows,
        tokenizer=tokenizer,
        grammar=grammar,
        system="" if system == "none" else system,
        max_prompt_tokens=config.data.max_prompt_tokens,
        scorer=scorer,
        balance_weights=balance,
        match=settings.match,
        balance=settings.balance,
        max_failed=settings.max_error_rate * rollout.prompts_per_step * rollout.group_size,
    )


def check_prompts(task: Task) -> None:
    """Every prompt keeps room for its post.

    Raises:
        ConfigError: one has none; it names the longest.
    """
    rows = (*task.rows.train, *task.rows.test, *task.rows.cold_start)
    fixed = [
        (fixed_length(row, task.tokenizer, system=task.system, prefill=task.grammar.prefill), row)
        for row in {(row.dataset_id, row.instruction): row for row in rows}.values()
    ]
    longest, row = max(fixed, key=lambda pair: pair[0])
    if longest > task.max_prompt_tokens:
        raise ConfigError(
            f"data.max_prompt_tokens: expected at least {longest} (system prompt, instruction and "
            f"prefill alone, data set {row.dataset_id!r}), got {task.max_prompt_tokens}. Type "
            f"--data.max_prompt_tokens {longest + 128}, or shorten the system prompt or the "
            "instruction; only the post is ever shortened."
        )


def check_written(task: Task, token_budget: int) -> None:
    """Every written completion fits into a micro-batch with its prompt.

    Raises:
        ConfigError: one does not; it names the first.
    """
    too_long: list[tuple[Row, int]] = []
    for row in task.rows.cold_start:
        size = len(task.written_text(row).encode()) + task.max_prompt_tokens
        if size + 8 > token_budget:  # a token is a byte or more, but for a few that frame a text
            length = len(task.written(row))
            too_long += [(row, length)] if length > token_budget else []
    if too_long:
        row, length = too_long[0]
        others = f" ({len(too_long)} rows are longer)" if len(too_long) > 1 else ""
        raise ConfigError(
            "train.token_budget: expected at least the longest written completion with its "
            f"prompt, got {token_budget}: {task.place(row)} has {length} tokens{others}. Type "
            f"--train.token_budget {max(n for _, n in too_long)}, or shorten the completions."
        )


@lru_cache(maxsize=4)  # this epoch's and the next one's, for each of two streams
def _shuffled(num_rows: int, seed: str) -> tuple[int, ...]:
    """All row indices; every step of an epoch reads from the same shuffle."""
    return tuple(random.Random(seed).sample(range(num_rows), num_rows))


def order(num_rows: int, seed: int, first: int, count: int) -> list[int]:
    """``count`` row indices from position ``first`` of an endless stream of shuffled epochs.

    A pure function of its arguments: a resumed run needs no state to continue it.
    """
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(first + len(indices), num_rows)
        permutation = _shuffled(num_rows, f"{seed}/{epoch}")
        indices += permutation[offset : offset + count - len(indices)]
    return indices


def stratified(rows: list[Row], per_dataset: int) -> list[Row]:
    """A fixed sample of at most ``per_dataset`` rows of each data set with its label proportions.

    Every label keeps its share (largest remainders), at least one row where it has any and room
    allows; the choice depends on the rows alone, never on the seed of a run.
    """
    chosen: list[Row] = []
    for name in dict.fromkeys(r.dataset_id for r in rows):
        members = [r for r in rows if r.dataset_id == name]
        if per_dataset <= 0 or len(members) <= per_dataset:
            chosen += members
            continue
        counts = Counter(r.label for r in members)
        share = {label: n * per_dataset / len(members) for label, n in counts.items()}
        quota = {label: int(x) for label, x in share.items()}
        rest = sorted(share, key=lambda c: (quota[c] - share[c], c))
        for label in rest[: per_dataset - sum(quota.values())]:
            quota[label] += 1
        picked: set[int] = set()
        for label, n in quota.items():
            indices = [i for i, r in enumerate(members) if r.label == label]
            picked.update(random.Random(f"{name}/{label}").sample(indices, n))
        chosen += [members[i] for i in sorted(picked)]
    return chosen
