"""The environment of the processes that tests start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**variables: str) -> dict[str, str]:
    """This process's variables and ``variables``, one thread and nothing of a group of ranks.

    The child imports from this tree before anything installed, and then all that this process
    does: pytest adds folders to ``sys.path`` that no child inherits.
    """
    kept = {name: value for name, value in os.environ.items() if name not in GROUP}
    paths = [str(ROOT / name) for name in (".", "kernels", "tests")]
    kept["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*paths, *filter(None, sys.path)]))
    return {**kept, "OMP_NUM_THREADS": "1", **variables}
