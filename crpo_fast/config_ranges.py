"""Ranges of single numbers of a configuration: what each may be, and what to type instead."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from crpo_fast.config_file import ConfigError

if TYPE_CHECKING:
    from crpo_fast.config import Config


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """``words`` say what is ``expected``; NaN is in no range."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Range("a positive number", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Range("0 or more", lambda x: 0 <= x < math.inf)
SHARE = Range("a share between 0 and 1", lambda x: 0 <= x <= 1)
MOMENTUM = Range("numbers in [0, 1)", lambda x: 0 <= x < 1)
BOUND = Range("a positive number (inf: no bound)", lambda x: x > 0)
SEED = Range("a number in 0 .. 2**32 - 1", lambda x: 0 <= x < 2**32)
NUMBER = Range("a number", lambda x: not math.isnan(x))  # of all that stand in no row

_NAMES: dict[Range, str] = {
    SEED: "seed",
    POSITIVE: """
        model.build.hidden_size model.build.num_layers model.build.num_heads
        lora.alpha model.build.num_kv_heads model.build.intermediate_size model.build.vocab_size
        data.synthetic.train data.synthetic.val data.synthetic.test data.synthetic.cold_start
        data.max_prompt_tokens entropy.reference_length rewards.timeout rewards.start_timeout
        objective.bnpo_group rollout.prompts_per_step rollout.max_tokens rollout.max_resamples
        train.token_budget train.workspace_mib train.updates_per_rollout train.max_nonfinite
        train.timeout eval.batch checkpoint.keep phases.steps phases.sequences_per_step
        """,
    NOT_NEGATIVE: """
        lora.rank rewards.workers rollout.top_k train.max_steps train.threads train.minibatches
        optim.lr
        optim.weight_decay optim.warmup_steps eval.every eval.limit eval.max_tokens
        checkpoint.every report.trace_every report.trace_samples report.probe_every
        report.probe_prompts phases.lr phases.warmup_steps
        """,
    SHARE: "data.synthetic.bias data.synthetic.conflict rewards.max_error_rate",
    MOMENTUM: "optim.betas lora.dropout",
    BOUND: "optim.max_grad_norm rollout.max_mismatch",
}
RANGES = {name: range_ for range_, names in _NAMES.items() for name in names.split()}


def check_ranges(config: Config) -> None:
    """Refuse the first number outside its range.

    Raises:
        ConfigError: the option, its range and what to type.
    """
    for name, value, usual in _numbers(config):
        plain = ".".join(part for part in name.split(".") if not part.isdigit())
        range_ = RANGES.get(plain, NUMBER)
        values = value if isinstance(value, tuple) else (value,)
        if not all(range_.holds(x) for x in values):
            got = list(value) if isinstance(value, tuple) else value
            advice = _advice(name, usual)
            raise ConfigError(f"{name}: expected {range_.words}, got {got}. {advice}")


def _advice(name: str, usual: Any) -> str:
    """``usual``: the default; None or () where leaving the option out means something else."""
    if usual is None or usual == ():
        return f"Leave --{name} out for the default."
    words = " ".join(map(str, usual)) if isinstance(usual, tuple) else usual
    return f"Type --{name} {words}."


def _numbers(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, value, default) of every number and every tuple of numbers, however deep."""
    for field in dataclasses.fields(settings):
        name, value = f"{prefix}{field.name}", getattr(settings, field.name)
        tables = value if isinstance(value, tuple) else ()
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{name}.")
        elif tables and all(map(dataclasses.is_dataclass, tables)):
            for index, table in enumerate(tables):
                yield from _numbers(table, f"{name}.{index}.")
        elif all(isinstance(x, int | float) for x in (tables or (value,))):
            yield name, value, field.default
