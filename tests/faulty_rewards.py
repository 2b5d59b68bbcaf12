"""Reward functions that fail on marked completions; workers import this file by its name."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import math
import os
import random
import subprocess
import sys
import time

calls = 0


def length(completions):
    return [len(c) / 10 for c in completions]


def misbehave(mark):
    """What a mark asks for; the value of a sample that has none."""
    if mark == "hang":
        time.sleep(600)
    if mark == "spin":
        ctypes.PyDLL(None).sleep(600)  # holds the GIL
    if mark == "exit":
        os._exit(3)
    if mark == "crash":
        ctypes.string_at(0)
    if mark == "kill":
        os.kill(os.getpid(), 9)
    if mark == "leave":
        sys.exit("enough")
    if mark == "memory":
        bytearray(1 << 60)
    if mark == "raise":
        raise ValueError("no such label")
    return {"nan": math.nan, "inf": math.inf, "word": "seven", "none": None}.get(mark, 1.0)


def marked(completions, **columns):
    """One value per completion, but none for "drop"."""
    return [misbehave(c) for c in completions if c != "drop"]


def by_dataset(completions, dataset_id, **columns):
    """Data sets that have the name of a mark below fail."""
    marks = {
        "Dreaddit": "raise",
        "DATD": "hang",
        "SDCNL": "exit",
        "FIG": "nan",
        "RSD": "drop",
    }
    found = [marks.get(name, "") for name in dataset_id]
    return [misbehave(mark) for mark in found if mark != "drop"]


def by_environment(completions, **columns):
    """All samples misbehave as the variable says."""
    mark = os.environ.get("REWARD_FAULT", "")
    return [misbehave(mark) for _ in completions if mark != "drop"]


def above_mean(completions, **columns):
    """Compares the samples of a prompt; raises on "raise"."""
    sizes = [len(c) for c in completions if misbehave(c)]
    return [size - sum(sizes) / len(sizes) for size in sizes]


def not_together(completions, **columns):
    """Raises on several samples, never on one."""
    if len(completions) > 1:
        raise RuntimeError("one at a time")
    return [1.0]


def first_call_fails(completions, **columns):
    global calls
    calls += 1
    if calls == 1:
        raise ConnectionError("the judge does not answer")
    return [float(len(completions))] * len(completions)


def not_a_list(completions, **columns):
    return 1.0


def quotes(prompts, completions, **columns):
    raise ValueError(f"cannot score {completions[0]} of {prompts[0]!r}: no tag")


def draws(completions, **columns):
    return [random.random() for _ in completions]


def environment(completions, **columns):
    """Torch loaded, pid, descriptor of the trainer, file of the cwd, PYTHONPATH of children."""
    print("a line of the reward function")
    child = subprocess.run(
        [sys.executable, "-c", "import os; print(os.environ.get('PYTHONPATH', ''))"],
        capture_output=True,
        text=True,
        check=True,
    )
    number = int(completions[0])
    try:
        os.fstat(number)
    except OSError:
        number = -1
    same_path = child.stdout.strip() == completions[1]
    return [
        "torch" in sys.modules,
        os.getpid(),
        number,
        os.path.exists("here.txt"),
        same_path,
    ]


def with_child(completions, **columns):
    """Starts a program, writes its pid to the file that the completion names, and hangs."""
    child = subprocess.Popen(["sleep", "600"])
    with open(completions[0], "w") as file:
        file.write(str(child.pid))
    time.sleep(600)


async def judge(completions, **columns):
    """Takes .2 s whatever the number of calls under way."""
    await asyncio.sleep(0.2)
    if "hang" in completions:
        await asyncio.sleep(600)
    return [misbehave(c) for c in completions]


def scaled(completions, factor, **columns):
    return [factor * len(c) for c in completions]


class Thrice:
    def __call__(self, completions, **columns):
        return [3.0] * len(completions)


twice = functools.partial(scaled, factor=2)
thrice = Thrice()
