"""Groups of gloo ranks that are forks of one process: imports come once."""

from __future__ import annotations

import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = timedelta(seconds=60)  # that a rank waits for another one


def run_group(size: int, out: Path, work: Callable[[int, int], Any]) -> bool:
    """What ``work(rank, size)`` of each rank returns, to <out>/<size>.json; whether all did."""
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(rank, size, out, work)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return not any(process.exitcode for process in ranks)


def run_rank(rank: int, size: int, out: Path, work: Callable[[int, int], Any]) -> None:
    """One process of a group."""
    store = dist.FileStore(str(out / f"store_{size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=LIMIT)
    try:
        results = work(rank, size)
    except BaseException:
        print(f"rank {rank} of {size}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        raise
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, results)
    if rank == 0:
        (out / f"{size}.json").write_text(json.dumps(gathered), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
