"""How reward functions are found, called and added up.

A reward function is any importable ``module:function`` with the signature that TRL uses, sync or
async: ``f(prompts, completions, **columns) -> list[float | None]``, called with keywords, one
value per completion; None means that it does not apply to that sample. A function without
``**columns`` gets the arguments it names.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

RewardFunction = Callable[..., Any]
Completion = str | Sequence[Mapping[str, Any]]  # text, or TRL's conversational form
# nan: NaN, infinite or no number; wrong_length: not one value per completion
ERROR_KINDS = ("exception", "timeout", "nan", "wrong_length", "crash")


class RewardError(RuntimeError):
    """A reward function raised, or did not return one number (or None) per completion."""


@dataclass(frozen=True)
class RewardFailure:
    """One value that a function did not give.

    Attributes:
        kind: one of ``ERROR_KINDS``.
        function: its name.
        sample: index of the completion among those that were scored.
        text: the exception or what came instead of a number; no text of posts or completions.
    """

    kind: str
    function: str
    sample: int
    text: str


@dataclass(frozen=True)
class RewardTable:
    """Rewards of N completions.

    Attributes:
        total: [N] weighted sums of the functions that apply; NaN where none applies or one of them
            failed.
        parts: function name -> [N] unweighted values; None where it does not apply or failed.
        errors: what failed, in order of sample.
        recovered: how many samples got their values from a second call of their group.
        not_run: how many samples were not scored, because too many had failed before.
    """

    total: list[float]
    parts: dict[str, list[float | None]]
    errors: tuple[RewardFailure, ...] = ()
    recovered: int = 0
    not_run: int = 0


def load_reward(path: str) -> RewardFunction:
    """The function that ``module:function`` names.

    Raises:
        ValueError: not of that form, not importable, not there, or not callable.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(
            f"rewards.functions: expected 'module:function', got {path!r}. "
            "Write e.g. 'crpo_fast.rewards:answer_reward' or 'my_rewards:is_short'."
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"rewards.functions: expected an importable module in {path!r}, got {error!r}. "
            "Install it, or put its folder on PYTHONPATH: PYTHONPATH=. torchrun ..."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = [
            n for n, v in vars(module).items() if inspect.isroutine(v) and not n.startswith("_")
        ]
        raise ValueError(
            f"rewards.functions: expected a function {name!r} in {module_name}, got "
            f"{'none' if function is None else repr(function)}. It has: "
            f"{', '.join(found) or 'no functions'}."
        )
    return function


def score(
    functions: Sequence[RewardFunction] | Mapping[str, RewardFunction],
    weights: Sequence[float],
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    columns: Mapping[str, Sequence[Any]],
    **shared: Any,
) -> RewardTable:
    """Call every function on all completions and add up what they return.

    Args:
        functions: the functions, or name -> function; a second function of the same name gets
            ``_2``.
        weights: one per function.
        prompts: N prompts.
        completions: N completions.
        columns: name -> N values, handed over by name.
        shared: further keywords for every function, the same for all samples (grammar,
            balance_weights ...).

    Raises:
        RewardError: a function raised or returned the wrong thing; names the function and a sample.
        ValueError: the lengths of the arguments do not fit.
    """
    by_name = functions if isinstance(functions, Mapping) else named(functions)
    per_sample = per_sample_keywords(prompts, completions, columns, shared)
    if len(weights) != len(by_name):
        raise ValueError(
            f"weights: expected one per function, {len(by_name)}, got {len(weights)}. "
            "Write as many rewards.weights as rewards.functions."
        )
    parts: dict[str, list[float | None]] = {}
    for name, values in _call_all(by_name, per_sample, shared).items():
        parts[name] = _numbers(name, values, completions)
    errors = [
        RewardFailure("nan", name, i, f"returned {value}")
        for name, part in parts.items()
        for i, value in enumerate(part)
        if value is not None and not math.isfinite(value)
    ]
    return add_up(parts, weights, len(completions), errors)


def per_sample_keywords(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    columns: Mapping[str, Sequence[Any]],
    shared: Iterable[str],
) -> dict[str, Sequence[Any]]:
    """Name -> N values of all keywords that differ by sample.

    Raises:
        ValueError: lengths differ, or a column has the name of one of the others.
    """
    if taken := sorted({"prompts", "completions", *shared}.intersection(columns)):
        raise ValueError(
            f"columns: expected names that are free, got {taken}, which every reward function gets "
            "already. Rename the column in the data file."
        )
    per_sample = {"prompts": prompts, "completions": completions, **columns}
    for name, values in per_sample.items():
        if len(values) != len(completions):
            raise ValueError(
                f"{name}: expected one entry per completion, {len(completions)}, got "
                f"{len(values)}. Repeat a prompt's value for each of its samples."
            )
    return per_sample


def add_up(
    parts: Mapping[str, Sequence[float | None]],
    weights: Sequence[float],
    count: int,
    errors: Sequence[RewardFailure] = (),
    **counts: int,
) -> RewardTable:
    """The table of [count] values per function; a value that is not finite makes its total NaN.

    Args:
        parts: function name -> [count] values.
        weights: one per function.
        count: completions.
        errors: what failed.
        counts: further fields of the table.
    """
    total = [_weighted_sum(row, weights) for row in zip(*parts.values(), strict=True)]
    clean = {name: [_finite_or_none(v) for v in part] for name, part in parts.items()}
    ordered = tuple(sorted(errors, key=lambda e: e.sample))
    return RewardTable(total if parts else [math.nan] * count, clean, ordered, **counts)


def _weighted_sum(values: Sequence[float | None], weights: Sequence[float]) -> float:
    applicable = [w * v for v, w in zip(values, weights, strict=True) if v is not None]
    total = sum(applicable) if applicable else math.nan
    return total if math.isfinite(total) else math.nan


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _call_all(
    by_name: Mapping[str, RewardFunction], per_sample: Mapping[str, Any], shared: dict[str, Any]
) -> dict[str, Any]:
    """Sync functions one after the other; what async ones return is awaited together."""
    results: dict[str, Any] = {}
    for name, function in by_name.items():
        try:
            results[name] = function(**accepted(function, {**per_sample, **shared}))
        except Exception as error:
            for started in filter(inspect.iscoroutine, results.values()):
                started.close()
            raise _raised(name, function, per_sample, shared, error) from error
    pending = {name: value for name, value in results.items() if inspect.isawaitable(value)}
    for name, value in _await_all(pending).items():
        if isinstance(value, Exception):
            raise _raised(name, by_name[name], per_sample, shared, value) from value
        results[name] = value
    return results


def _await_all(pending: dict[str, Awaitable[Any]]) -> dict[str, Any]:
    """Name -> result or exception; a thread of its own, for a loop may be running in this one."""
    if not pending:
        return {}

    async def gather() -> list[Any]:
        return await asyncio.gather(*pending.values(), return_exceptions=True)

    with ThreadPoolExecutor(1) as pool:
        return dict(zip(pending, pool.submit(lambda: asyncio.run(gather())).result(), strict=True))


def accepted(function: RewardFunction, keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords that ``function`` takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C: no signature to read
        return keywords
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return keywords
    names = {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
    return {name: value for name, value in keywords.items() if name in names}


def _raised(
    name: str,
    function: RewardFunction,
    per_sample: Mapping[str, Any],
    shared: dict[str, Any],
    error: Exception,
) -> RewardError:
    """The message for an exception: the first sample that raises when it is scored alone."""
    sample = "no single sample raises alone"
    for i in range(len(per_sample["completions"])):
        one = {key: values[i : i + 1] for key, values in per_sample.items()}
        if _fails(function, {**one, **shared}):
            sample = _sample(i, per_sample["completions"][i])
            break
    return RewardError(
        f"reward {name}: expected rewards, got {error!r}; {sample}. Mend the function; it may use "
        f"the keywords {', '.join([*per_sample, *shared])}."
    )


def _fails(function: RewardFunction, keywords: dict[str, Any]) -> bool:
    try:
        value = function(**accepted(function, keywords))
    except Exception:  # the caller reports the first exception; here it counts who raises
        return True
    return inspect.isawaitable(value) and isinstance(_await_all({"": value})[""], Exception)


def _numbers(name: str, values: Any, completions: Sequence[Completion]) -> list[float | None]:
    """What a function returned, checked: one number or None per completion."""
    if isinstance(values, str | Mapping) or not hasattr(values, "__len__"):
        raise RewardError(
            f"reward {name}: expected a list of numbers, got {type(values).__name__}. "
            "Return one float (or None) per completion."
        )
    if len(values) != len(completions):
        first = min(len(values), len(completions))
        at = (
            _sample(first, completions[first])
            if first < len(completions)
            else "a sample that does not exist"
        )
        raise RewardError(
            f"reward {name}: expected {len(completions)} values, got {len(values)}; they part at "
            f"{at}. Return one float (or None) per completion."
        )
    numbers: list[float | None] = []
    for i, value in enumerate(values):
        try:
            numbers.append(None if value is None else float(value))
        except Exception as error:  # OverflowError of a large int, RuntimeError of a tensor ...
            raise RewardError(
                f"reward {name}: expected a number or None, got {type(value).__name__}; "
                f"{_sample(i, completions[i])}. Return one float (or None) per completion."
            ) from error
    return numbers


def named(functions: Sequence[RewardFunction]) -> dict[str, RewardFunction]:
    """Name -> function, in order; a second function of the same name gets ``_2``."""
    by_name: dict[str, RewardFunction] = {}
    for function in functions:
        inner = function
        while isinstance(inner, functools.partial):
            inner = inner.func
        base = name = getattr(inner, "__name__", type(inner).__name__)
        number = 1
        while name in by_name:
            number += 1
            name = f"{base}_{number}"
        by_name[name] = function
    return by_name


def _sample(index: int, completion: Completion) -> str:
    """Which sample; what it says may quote a post and stays out of messages."""
    return f"sample {index}, a completion of {len(completion_text(completion))} character(s)"


def completion_text(completion: Completion) -> str:
    """A completion's text; the last message of a conversation."""
    if isinstance(completion, str):
        return completion
    try:
        return completion[-1]["content"]
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"completions: expected text or a list of messages, got {type(completion).__name__}. "
            "Pass strings, or [{'role': 'assistant', 'content': ...}]."
        ) from error
