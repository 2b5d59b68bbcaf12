"""One reward worker: ``python -m crpo_fast.reward_worker <fd> <pid>``, started by `reward_process`.

Frames come in on the socket ``fd``: 8 bytes of length, a pickled (kind, payload) of the trainer.

    load    {"functions": ["module:function", ...], "path": sys.path, "pythonpath": the trainer's
            variable or None, "timeout": seconds per sample}
            -> {"ready": names, "asynchronous": [bool, ...]} or {"refused": why}
    shared  {keyword: value}, further keywords of every call (grammar, balance_weights, ...)
    job     {"function": index, "calls": [{keyword: [n values]}, ...]}
            -> {"results": [one of each call]}: {"values": [n], "bad": [[i, text], ...]} or
            {"error": kind, "text": why}

Answers are lines of JSON. Neither torch nor transformers is imported here, unless a reward function
does. Random generators are seeded from the texts of each call, so that a resumed run scores alike.

The worker leads a process group of its own, which the trainer can kill as a whole and which no
Ctrl-C of the terminal reaches. It ends with the trainer: by a signal of the kernel (Linux), or when
the socket closes (everywhere).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import inspect
import json
import math
import os
import pickle
import queue
import random
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from crpo_fast.reward_calls import accepted, load_reward, named

LENGTH_BYTES = 8
MAX_TEXT = 300  # characters of an exception
_QUOTED = 12  # an exception's text that repeats so many characters of a post is hidden


def main() -> None:
    """Serve jobs until the socket closes."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)  # not for the processes that reward functions start
    _prepare_process(int(sys.argv[2]))
    inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_read_frames, args=(channel, inbox), daemon=True).start()
    functions: list[Callable[..., Any]] = []
    shared: dict[str, Any] = {}
    timeout = math.inf
    while (frame := inbox.get()) is not None:
        kind, payload = pickle.loads(frame)
        if kind == "load":
            timeout = payload["timeout"]
            _restore_paths(payload["path"], payload["pythonpath"])
            functions, answer = _load(payload["functions"])
        elif kind == "shared":
            shared = payload
            continue
        else:
            function = functions[payload["function"]]
            answer = {"results": _run(function, payload["calls"], shared, timeout)}
        channel.sendall(json.dumps(answer).encode() + b"\n")


def _prepare_process(trainer: int) -> None:
    """Signals, the end with the trainer, and who is killed first when memory runs out."""
    faulthandler.enable(all_threads=False)  # a crash shows the reward function's line
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    for signum in (signal.SIGINT, signal.SIGTERM):  # a scheduler signals all; the trainer decides
        signal.signal(signum, lambda *_: None)  # not SIG_IGN, which programs started here inherit
        os.register_at_fork(after_in_child=partial(signal.signal, signum, signal.SIG_DFL))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        with contextlib.suppress(OSError):  # not allowed everywhere; the trainer is then as likely
            Path("/proc/self/oom_score_adj").write_text("1000")
    if os.getppid() != trainer:
        os._exit(1)  # it died before the kernel was asked


def _read_frames(channel: socket.socket, inbox: queue.SimpleQueue[bytes | None]) -> None:
    """Socket -> queue; at its end, also of a job that is running."""
    stream = channel.makefile("rb")
    with contextlib.suppress(OSError):
        while len(header := stream.read(LENGTH_BYTES)) == LENGTH_BYTES:
            inbox.put(stream.read(int.from_bytes(header, "little")))
    inbox.put(None)
    time.sleep(1)  # an idle worker leaves by itself
    os.killpg(os.getpid(), signal.SIGKILL)


def _restore_paths(path: list[str], pythonpath: str | None) -> None:
    """The trainer's, for imports here and for programs that reward functions start."""
    sys.path[:] = path
    os.environ.pop("PYTHONPATH")
    if pythonpath is not None:
        os.environ["PYTHONPATH"] = pythonpath


def _load(paths: Sequence[str]) -> tuple[list[Callable[..., Any]], dict[str, Any]]:
    try:
        functions = [load_reward(path) for path in paths]
    except ValueError as error:
        return [], {"refused": str(error)}
    asynchronous = [_is_async(function) for function in functions]
    return functions, {"ready": list(named(functions)), "asynchronous": asynchronous}


def _is_async(function: Callable[..., Any]) -> bool:
    while isinstance(function, partial):
        function = function.func
    call = type(function).__call__  # of an object
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _run(
    function: Callable[..., Any],
    calls: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    timeout: float,
) -> list[dict[str, Any]]:
    """What each call gave; coroutines are awaited together, each for ``timeout`` per sample."""
    returned: list[Any] = []
    for call in calls:
        _seed(call)
        try:
            returned.append(function(**accepted(function, {**call, **shared})))
        except BaseException as error:  # also SystemExit: it is the function that is wrong
            returned.append(error)
    returned = _await_all(returned, [timeout * len(call["completions"]) for call in calls])
    return [_result(value, call) for value, call in zip(returned, calls, strict=True)]


def _await_all(values: list[Any], limits: Sequence[float]) -> list[Any]:
    """Awaitables replaced by what they give, or by the exception they raise."""
    places = [i for i, value in enumerate(values) if inspect.isawaitable(value)]
    if not places:
        return values

    async def one(value: Awaitable[Any], limit: float) -> Any:
        watch = asyncio.timeout(limit)
        try:
            async with watch:
                return await value
        except TimeoutError as error:
            raise (_LateError(limit) if watch.expired() else error) from error

    async def gather() -> list[Any]:
        waiting = [one(values[i], limits[i]) for i in places]
        return await asyncio.gather(*waiting, return_exceptions=True)

    try:
        given = asyncio.run(gather())
    except BaseException as error:  # SystemExit in a coroutine ends the whole loop
        given = [error] * len(places)
    done = list(values)
    for i, value in zip(places, given, strict=True):
        done[i] = value
    return done


def _result(value: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    count = len(call["completions"])
    if isinstance(value, _LateError):
        return {"error": "timeout", "text": str(value)}
    if isinstance(value, BaseException):
        return {"error": "exception", "text": describe(value, call)}
    try:
        given = list(value) if hasattr(value, "__len__") else None
    except Exception:  # of a scalar array, say: no list
        given = None
    if given is None or isinstance(value, str | Mapping):
        text = f"returned {type(value).__name__}, not a list"
        return {"error": "wrong_length", "text": text}
    if len(given) != count:
        return {"error": "wrong_length", "text": f"returned {len(given)} values for {count}"}
    values = [_number(v) for v in given]
    bad = [
        [i, f"returned {number if _is_number(v) else type(v).__name__}"]
        for i, (v, number) in enumerate(zip(given, values, strict=True))
        if number is not None and not math.isfinite(number)
    ]
    return {"values": values, "bad": bad}


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except Exception:  # whatever float() refuses is no number; the caller counts it
        return math.nan


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except Exception:
        return False
    return True


def describe(error: BaseException, call: Mapping[str, Any]) -> str:
    """The exception in one line, without what it quotes from the texts of the call."""
    try:
        text = repr(error)
    except Exception:
        text = f"{type(error).__name__} that cannot be printed"
    text = " ".join(text[: 2 * MAX_TEXT].split())
    starts = range(len(text) - _QUOTED + 1)
    quotes = _runs(call)
    hidden = [text[i : i + _QUOTED] in quotes for i in starts] + [False] * _QUOTED
    shown, last = [], -_QUOTED  # last: where the last quoted run began
    for i, character in enumerate(text):
        if hidden[i] and i - last >= _QUOTED:
            shown.append("[text]")
        last = i if hidden[i] else last
        if i - last >= _QUOTED:
            shown.append(character)
    text = "".join(shown)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " ..."


def _runs(call: Mapping[str, Any]) -> set[str]:
    """All runs of ``_QUOTED`` characters of the call's texts, as they are and as ``repr`` shows."""
    found: set[str] = set()
    for values in call.values():
        for value in {str(v) for v in values}:
            for text in {value, repr(value)[1:-1], repr(repr(value))[2:-2]}:
                line = " ".join(text.split())
                found.update(line[i : i + _QUOTED] for i in range(len(line) - _QUOTED + 1))
    return found


class _LateError(Exception):
    """An awaitable gave nothing in time."""

    def __init__(self, limit: float) -> None:
        super().__init__(f"no answer within {limit:g} s")


def _seed(call: Mapping[str, Any]) -> None:
    """Seed the generators that are loaded, from the texts of the call."""
    seed = zlib.crc32(repr((call["prompts"], call["completions"])).encode(errors="replace"))
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


if __name__ == "__main__":
    main()
