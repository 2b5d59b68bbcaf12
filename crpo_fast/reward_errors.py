"""What people and metrics.jsonl see of rewards that failed.

    reward/errors/<kind>      values that a function did not give, per kind, summed over ranks
    reward/errors/recovered   samples whose values came from a second call of their group
    reward/errors/not_run     samples that were not scored, because too many had failed before
    reward/error_rate         share of the samples, over all ranks, that failed or were not run

Per kind and step one line names a sample: function, rank, index in the rank's batch, data set, and
the exception; no text of a post.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crpo_fast import distributed
from crpo_fast.batch import Row
from crpo_fast.endings import same_command
from crpo_fast.metrics import Sums
from crpo_fast.reward_calls import ERROR_KINDS, RewardError, RewardTable

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from crpo_fast.experience import Experience
    from crpo_fast.phases import Run


def record(sums: Sums, table: RewardTable) -> None:
    """Add the counts of one rank's rewards; the names do not depend on what failed."""
    for kind in ERROR_KINDS:
        sums.add_total(f"reward/errors/{kind}", sum(e.kind == kind for e in table.errors))
    sums.add_total("reward/errors/recovered", table.recovered)
    sums.add_total("reward/errors/not_run", table.not_run)
    failed = len({e.sample for e in table.errors}) + table.not_run
    sums.add("reward/error_rate", failed, len(table.total))


def note(first: dict[str, dict[str, Any]], table: RewardTable, rows: Sequence[Row]) -> None:
    """Keep the first failure of each kind in ``first``.

    Args:
        first: kind -> function, sample, dataset_id, text.
        table: of one rank's samples.
        rows: one per sample.
    """
    for error in table.errors:
        first.setdefault(
            error.kind,
            {
                "function": error.function,
                "sample": error.sample,
                "dataset_id": rows[error.sample].dataset_id,
                "text": error.text,
            },
        )


def check(run: Run, batch: Experience, optimizer: Optimizer) -> None:
    """Name a sample of each kind; too many failures end the run. A collective.

    The step's updates come afterwards: rewards that failed never change the weights.

    Args:
        run: stands before the step.
        batch: of the step, with the sums of all ranks.
        optimizer: of the phase, for the checkpoint of the state before the step.

    Raises:
        RewardError: more than ``rewards.max_error_rate`` of the samples failed.
    """
    metrics = {name: x for name, x in batch.sums.means().items() if x is not None}
    if not metrics.get("reward/error_rate"):  # the same on all ranks
        return
    step, bound = run.progress.step + 1, run.config.rewards.max_error_rate
    by_rank = distributed.all_gather(batch.reward_errors, run.session.world)
    for line in lines(by_rank, metrics, step):
        run.reporter.warning(line)
    message = verdict(metrics, bound, step)
    if message is not None:
        raise RewardError(f"{message} {_kept(run, optimizer)}")


def _kept(run: Run, optimizer: Optimizer) -> str:
    """What becomes of the steps before this one; they are saved if they were not."""
    progress, saved, again = run.progress, run.saver.saved_step, same_command(run.config)
    if progress.step != saved and progress.step == run.resume.progress.step:
        return f"This start has done no step yet: the {again} begins there again."
    # the weights of a phase's start are its predecessor's, which has tried to save them
    if progress.step == saved or (progress.phase_steps and run.save(optimizer)):
        return f"The state is saved: the {again} continues."
    return "Saving failed."


def lines(
    by_rank: Sequence[Mapping[str, Mapping[str, Any]]], metrics: Mapping[str, float], step: int
) -> list[str]:
    """One line per kind that occurred, of the first rank that saw it."""
    written = []
    for kind in ERROR_KINDS:
        rank = next((r for r, found in enumerate(by_rank) if kind in found), None)
        if rank is None:
            continue
        first, count = by_rank[rank][kind], metrics[f"reward/errors/{kind}"]
        written.append(
            f"step {step}: reward {kind} x {count:.0f}, first: function {first['function']}, rank "
            f"{rank}, sample {first['sample']}, data set {first['dataset_id']}: {first['text']}"
        )
    return written


def verdict(metrics: Mapping[str, float], bound: float, step: int) -> str | None:
    """The message that ends the run, or None."""
    rate, is_abandoned = metrics["reward/error_rate"], bool(metrics["reward/errors/not_run"])
    if rate <= bound and not is_abandoned:
        return None
    # further rounds of dynamic sampling may have gone well, after one that was given up
    part, found = "step", f"{rate:.1%} at step {step}"
    if rate <= bound:
        part, found = "round", f"more in one of step {step}, {rate:.1%} over all its rounds"
    names = (*ERROR_KINDS, "not_run")
    counts = {name: metrics[f"reward/errors/{name}"] for name in names}
    shown = ", ".join(f"{n:.0f} {name}" for name, n in counts.items() if n)
    return (
        f"rewards: expected at most {bound:.1%} of a {part}'s samples without a reward "
        f"(rewards.max_error_rate), got {found} ({shown}; the warnings name "
        "samples). Mend the functions, or raise --rewards.timeout for slow ones or "
        "--rewards.max_error_rate."
    )
