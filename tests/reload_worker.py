"""Load a checkpoint into the sharded model and optimizer of a config, save it elsewhere.

torchrun reload_worker.py <config> <run folder> <checkpoint> <where to>
"""

from __future__ import annotations

import sys
from pathlib import Path

from crpo_fast import checkpoint, distributed, session
from crpo_fast.config import parse_arguments
from crpo_fast.optim import build_optimizer


def main(config_path: str, run_dir: str, source: str, target: str) -> None:
    config = parse_arguments([config_path, "--run.dir", run_dir])
    world = distributed.init(threads=1)
    built = session.build(config, world, Path(run_dir))
    model = built.policy.model
    optimizer = build_optimizer(model, config.optim)
    progress = checkpoint.load_progress(Path(source))
    checkpoint.load_model(Path(source), model)
    checkpoint.load_optimizer(Path(source), model, optimizer)
    checkpoint.save(Path(target), model, optimizer, progress, world)
    distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
