"""The entry point. Type torchrun crpo_fast/train.py [config.toml] [--section.key value ...].

`train` names every stage of a step once; what each does is in the module it comes from.
"""

from __future__ import annotations

import sys
from pathlib import Path

# torchrun puts this folder first on sys.path, where its files could shadow installed packages
_HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _HERE]

import contextlib  # noqa: E402
import random  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from contextlib import ExitStack  # noqa: E402

import numpy  # noqa: E402
import torch  # noqa: E402

from crpo_fast import (  # noqa: E402
    distributed,
    experience,
    outcome,
    provenance,
    report,
    reward_errors,
    run_folder,
    screen,
    session,
    timing,
    trackers,
    wall,
)
from crpo_fast.batch import Row  # noqa: E402
from crpo_fast.checkpoint import CheckpointError, SaveError  # noqa: E402
from crpo_fast.config import Config, ConfigError, PhaseConfig, parse_arguments  # noqa: E402
from crpo_fast.console import Reporter  # noqa: E402
from crpo_fast.data import DataError  # noqa: E402
from crpo_fast.distributed import World  # noqa: E402
from crpo_fast.dynamic_sampling import Resampling, further_rows, round_seed  # noqa: E402
from crpo_fast.endings import (  # noqa: E402
    EntropyExplosionError,
    MismatchError,
    Stopped,
    StopSignal,
    same_command,
)
from crpo_fast.entropy_watch import EntropyWatch  # noqa: E402
from crpo_fast.experience import Experience  # noqa: E402
from crpo_fast.loss import loss_spec  # noqa: E402
from crpo_fast.model_check import UnsupportedModelError  # noqa: E402
from crpo_fast.models import ModelError  # noqa: E402
from crpo_fast.nonfinite import NonFiniteError  # noqa: E402
from crpo_fast.optim import learning_rate, set_learning_rate  # noqa: E402
from crpo_fast.peers import Peers  # noqa: E402
from crpo_fast.phases import Run  # noqa: E402
from crpo_fast.reward_pool import Scorer  # noqa: E402
from crpo_fast.rewards import RewardError  # noqa: E402
from crpo_fast.rollout import RolloutError  # noqa: E402
from crpo_fast.run_folder import Opened  # noqa: E402
from crpo_fast.step import micro_batches  # noqa: E402
from crpo_fast.task import build_grammar, open_rewards, order  # noqa: E402
from crpo_fast.timing import timer  # noqa: E402
from crpo_fast.traces import is_due  # noqa: E402
from crpo_fast.updates import add_old_logprobs, run_updates  # noqa: E402

USER_ERRORS = (ConfigError, CheckpointError, DataError, ModelError, UnsupportedModelError)
RUN_ERRORS = (
    EntropyExplosionError,
    MismatchError,
    NonFiniteError,
    RewardError,
    RolloutError,
    SaveError,
)


def train(run: Run) -> None:
    """All phases from where the run stands; one pass of the inner loop is one rollout."""
    config, policy = run.config, run.session.policy
    for phase in run.phases():
        for step in phase.steps():
            batch = gather(run, phase.config, step).reduced(run.session.world)
            reward_errors.check(run, batch, phase.optimizer)
            packed = [
                micro_batches(
                    sequences,
                    phase.loss,
                    policy,
                    token_budget=config.train.token_budget,
                    layout=config.train.layout,
                    reference=phase.reference,
                )
                for sequences in phase.plan.split(batch.sequences)
            ]
            packed = add_old_logprobs(packed, phase.loss, policy)
            set_learning_rate(phase.optimizer, learning_rate(step, phase.config, config.optim))
            metrics = run_updates(
                policy,
                phase.optimizer,
                packed,
                phase.loss,
                updates=phase.plan.updates,
                max_grad_norm=config.optim.max_grad_norm,
                guard=run.guard,
                where=f"step_{run.progress.step + 1}",
                trace=batch.trace,
            )
            phase.finish_step(step, metrics, batch)
    run.finish()


def gather(run: Run, phase: PhaseConfig, step: int) -> Experience:
    """This rank's sequences of one step: written ones in SFT, else sampled and scored ones.

    Rows and seeds are pure functions of (seed, step, rank), so that a resumed run needs no state
    for them.
    """
    config, world, task = run.config, run.session.world, run.session.task
    _seed_all(_seed(config.seed, step, world.rank))
    if phase.algorithm == "sft":
        rows, count = task.rows.cold_start, phase.sequences_per_step
        chosen = order(len(rows), config.seed, step * count, count)
        return experience.written(task, [rows[i] for i in chosen[world.rank :: world.size]])
    rows, count = task.rows.train, config.rollout.prompts_per_step
    chosen = order(len(rows), config.seed, step * count, count)
    share = count // world.size
    traced = is_due(step + 1, config.report.trace_every)
    return experience.collect(
        task,
        run.session.engine,
        [rows[i] for i in chosen[world.rank * share :][:share]],
        group_size=config.rollout.group_size,
        params=run.session.sampling(),
        seed=_seed(config.seed, step, 0),
        first=world.rank * share,
        scale=config.advantages.scale,
        all_rewards=lambda mine: [r for rs in distributed.all_gather(mine, world) for r in rs],
        mask_truncated=config.rollout.mask_truncated,
        resampling=_resampling(run, step, chosen) if config.rollout.dynamic_sampling else None,
        num_traced=config.report.trace_samples if traced and world.is_main else 0,
    )


def _resampling(run: Run, step: int, used: list[int]) -> Resampling:
    """Further prompts of a step whose first round has the rows ``used``, of all ranks."""
    config, world, rows = run.config, run.session.world, run.session.task.rows.train

    def further(round_: int, count: int) -> list[Row]:
        indices = further_rows(
            len(rows),
            used,
            seed=config.seed,
            step=step,
            round_=round_,
            rank=world.rank,
            world_size=world.size,
            share=len(used) // world.size,
        )
        return [rows[i] for i in indices[:count]]

    return Resampling(
        max_rounds=config.rollout.max_resamples,
        rows=further,
        seed=lambda round_: round_seed(config.seed, step, round_, world.rank),
        all_max=lambda value: distributed.all_max(value, world),
    )


def _seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step) * 4_096 + rank


def _seed_all(seed: int) -> None:
    """Every generator of the process, so that no state of one has to be saved."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # noqa: NPY002  (the global one, for reward functions)
    torch.manual_seed(seed)


def run(config: Config, world: World, reporter: Reporter, scorer: Scorer, last: ExitStack) -> None:
    """Open the run folder, continue where it stands, train; ``last`` gets what closes then."""
    started, stop = time.monotonic(), StopSignal()
    opened = run_folder.open_run(config, world)
    last.callback(opened.close)
    if opened.summary is not None:
        path = opened.folder.path
        reporter.closing(f"{path} is finished (--run.resume never starts again)")
        if world.is_main:
            outcome.show(opened.summary, path, reporter)
            if (page := path / "report.html").exists():
                reporter.closing(f"report: {page}")
        return
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    life = _build(config, world, opened, reporter, stop, started, scorer)
    last.callback(life.session.engine.close)
    if world.is_main:
        last.callback(wall.finish, opened.folder, reporter)  # after the report
        last.callback(_report, opened.folder.path, reporter)
    last.callback(life.trackers.close)
    try:
        train(life)
    except Stopped as reason:
        reporter.closing(
            f"stopped by {reason}; saved. The {same_command(config)} continues: "
            f"--run.dir {opened.folder.path}"
        )


def _report(path: Path, reporter: Reporter) -> None:
    with timer("report"):
        report.write_at_end(path, reporter.closing)


def _build(
    config: Config,
    world: World,
    opened: Opened,
    reporter: Reporter,
    stop: StopSignal,
    started: float,
    scorer: Scorer,
) -> Run:
    folder = opened.folder
    reporter.start()
    timing.enter("")
    with timer("load"):
        built = session.build(config, world, folder.path, scorer)
    if world.is_main:
        provenance.record_start(
            folder.path,
            step=opened.resume.progress.step,
            ranks=world.size,
            device=world.device.type,
        )
    life = Run(config, built, folder, opened.resume, reporter, stop, started)
    if world.is_main:
        for text in screen.warnings(built):
            reporter.warning(text)
        reporter.screen(screen.title(), screen.rows(built, folder, opened.resume))
    return life


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done or stopped by a signal, 2 the user must correct, 1 cannot go on."""
    peers = Peers()
    with ExitStack() as last:  # trackers and the report close after the message
        try:
            config = parse_arguments(sys.argv[1:] if arguments is None else arguments)
            # refuse now what would be refused after loading
            grammar = build_grammar(config)
            for phase in config.phases:
                EntropyWatch.build(config.entropy, phase, grammar)
                loss_spec(config, phase, grammar.coefs())
            trackers.check(config.track)
            scorer = last.enter_context(open_rewards(config))
            world = distributed.init(config.train.threads, config.train.timeout)
            peers = Peers(world.rank, world.size, world.store, config)
            peers.watch()
            reporter = Reporter(enabled=world.is_main, quiet=config.quiet)
            with contextlib.closing(reporter):  # ends the live line before a message
                run(config, world, reporter, scorer, last)
            status = 0
        except USER_ERRORS as error:
            status = peers.refuse(error, 2)
        except RUN_ERRORS as error:
            status = peers.refuse(error, 1)
        except Exception as error:  # memory, a collective that another rank left, or a bug
            status = peers.explain(error)
            if not status:
                raise
    peers.stop()
    try:
        distributed.shutdown(together=status == 0)
    except RuntimeError as error:
        status = peers.explain(error)
        if not status:
            raise
    return status


if __name__ == "__main__":
    sys.exit(main())
