"""The life of a run around its optimizer steps: phases, logging, evaluation, checkpoints, the end.

Run.phases()   -> each phase that is not done yet: optimizer, loss, KL reference, resumed state
Phase.steps()  -> each step that is not done yet
finish_step    -> sync the engine, log, evaluate, save, stop on a signal
Run.finish     -> final evaluation, export, summary, curves
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError

from crpo_fast import checkpoint, distributed, score_head, timing, trackers
from crpo_fast.alarm import Verdict
from crpo_fast.checkpoint import Progress, SaveError
from crpo_fast.config import Config, PhaseConfig
from crpo_fast.console import Reporter, notice
from crpo_fast.endings import EntropyExplosionError, Stopped, StopSignal, same_command
from crpo_fast.entropy_watch import EntropyWatch
from crpo_fast.evaluate import evaluate
from crpo_fast.experience import Experience
from crpo_fast.loss import LossSpec, loss_spec
from crpo_fast.metrics import JsonLines, Metrics
from crpo_fast.mismatch import MismatchCheck
from crpo_fast.nonfinite import Guard, is_finite
from crpo_fast.optim import build_optimizer
from crpo_fast.policy import Policy
from crpo_fast.probes import Probes
from crpo_fast.results import Evaluations, write_results
from crpo_fast.run_folder import Resume, RunFolder, needs_phase_start, phase_lengths
from crpo_fast.saving import Saver
from crpo_fast.session import Session
from crpo_fast.task import stratified
from crpo_fast.traces import is_due
from crpo_fast.updates import UpdatePlan, update_plan
from crpo_fast.watch import PhaseLine, tokens_and_seconds


@dataclass
class Run:
    """One run in its folder. ``progress`` says how far it got and is what a checkpoint stores."""

    config: Config
    session: Session
    folder: RunFolder
    resume: Resume
    reporter: Reporter
    stop: StopSignal
    started: float

    def __post_init__(self) -> None:
        main = self.session.world.is_main
        self.progress: Progress = self.resume.progress
        self.metrics = JsonLines(self.folder.path / "metrics.jsonl", enabled=main)
        self.samples = JsonLines(self.folder.path / "samples.jsonl", enabled=main)
        logged = self.progress.logged if self.resume.is_own else {}
        for log in (self.metrics, self.samples):
            log.cut(self.progress.step, logged.get(log.name, 0))
        self.guard = Guard(
            self.config.train.max_nonfinite,
            self.folder.path / "nonfinite",
            self.session.world,
            self.reporter.warning,
        )
        saved, path = self.progress.controllers, self.resume.path
        checkpoint.load_controller(self.guard, saved.get("nonfinite"), path)
        count = logged.get(Evaluations.name, 0)
        self.evaluations = Evaluations(self.folder, count, enabled=main)
        self.logs = (self.metrics, self.samples, self.evaluations)
        self.saver = Saver(
            self.config,
            self.folder,
            self.session.world,
            self.reporter,
            self.logs,
            saved_step=self.progress.step if self.resume.is_own else -1,
        )
        self.probes = Probes(self.session, self.samples)
        if self.resume.is_own:
            checkpoint.load_controller(self.probes, saved.get("probes"), path)
        self.trackers = trackers.start(
            self.config,
            self.folder.path,
            self.metrics.read,
            self.evaluations.results,
            self.reporter.warning,
            enabled=main,
        )

    @property
    def seconds(self) -> float:
        """Wall time of the run, earlier starts included."""
        return self.resume.progress.seconds + time.monotonic() - self.started

    def phases(self) -> Iterator[Phase]:
        """The phases that are not done, each ready to step."""
        with timing.timer("sync"):
            self.session.engine.sync(self.session.policy.model, self.progress.step)
        if self.config.eval.untrained:
            self.evaluate("untrained", step=0)
        lengths = phase_lengths(self.config)
        for index in range(self.progress.phase, len(lengths)):
            phase = _start(self, index, lengths[index])
            if index == self._first_trained_by_reward() and self.progress.phase_steps == 0:
                self.evaluate("before")
            yield phase
            self._end_phase(phase)

    def _first_trained_by_reward(self) -> int:
        kinds = [p.algorithm != "sft" for p in self.config.phases]
        return kinds.index(True) if True in kinds else 0

    def _end_phase(self, phase: Phase) -> None:
        timing.enter("")
        # a run that starts from another run's checkpoint has no end of that phase of its own
        if not self.progress.is_phase_end or self.saver.saved_step != self.progress.step:
            self.progress = replace(self.progress, is_phase_end=True)
            is_saved, following = self.save(phase.optimizer, regular=True), phase.index + 1
            if is_saved or following == len(self.config.phases):
                return
            if needs_phase_start(self.config, following):
                raise SaveError(
                    f"phase {following} could not be saved at its end (the warning says why), and "
                    f"phase {following + 1} cannot be resumed without it (its KL reference). Mend "
                    f"that, then type the {same_command(self.config)}: it continues from step "
                    f"{max(self.saver.saved_step, 0)}."
                )

    def evaluate(self, name: str, *, step: int | None = None) -> dict[str, Any]:
        """Evaluate the weights of now under ``name``; a resumed run reads the earlier result.

        Args:
            name: of the result.
            step: that the weights are of; None = all steps so far.
        """
        step = self.progress.step if step is None else step
        result = self.evaluations.get(name, step) or self._evaluate(name, step)
        self.progress = self.saver.note_best(self.progress, self.scores())
        return result

    def _evaluate(self, name: str, step: int) -> dict[str, Any]:
        task, settings = self.session.task, self.config.eval
        self.probes.answer(step)
        rows = stratified(task.rows.test, 0 if settings.full else settings.limit)
        start = time.monotonic()
        with timing.timer("evaluation"):
            result = evaluate(
                task,
                self.session.engine,
                rows,
                self.session.greedy(),
                self.session.world,
                batch=settings.batch,
            )
        result = self.evaluations.add(name, step, result)
        failure = self.evaluations.sync()
        if failure:
            notice(f"warning: {failure}; the results wait in memory")
        self.trackers.evaluation(result)
        self.reporter.line(
            f"evaluation {name}: weighted F1 {result['weighted_f1']:.1f}, format "
            f"{result['format_rate']:.1f} % ({result['num_rows']} rows, "
            f"{time.monotonic() - start:.0f} s)"
        )
        return result

    def scores(self) -> dict[str, float]:
        """Of the evaluation of the present weights, if there is one, by metric."""
        return self.evaluations.scores(self.progress.step)

    def save(self, optimizer: torch.optim.Optimizer, *, regular: bool = False) -> bool:
        """Write a checkpoint and prune old ones; False: it could not be written.

        Weights that are not finite are never written: nothing good would be left after a few.
        """
        if not is_finite(self.session.policy.model, self.session.world):
            self.reporter.warning("no checkpoint, the weights themselves are not finite")
            return False
        controllers = {**self.progress.controllers, "probes": self.probes.state_dict()}
        with timing.timer("save"):
            self.progress = self.saver.save(
                self.session.policy.model,
                optimizer,
                replace(self.progress, seconds=self.seconds, controllers=controllers),
                scores=self.scores(),
                regular=regular,
            )
        return self.saver.saved_step == self.progress.step

    def finish(self) -> None:
        """Final evaluation, transformers export, summary.json, curves and the closing lines.

        Raises:
            SaveError: on all ranks, if a file could not be written.
        """
        after = self.evaluate("after")
        weights = distributed.model_state(self.session.policy.model)
        failure = ""
        if self.session.world.is_main:
            try:
                with timing.timer("save"):
                    write_results(self, after, weights)
            except (OSError, SafetensorError) as error:
                failure = f"{self.folder.path}: the results could not be written ({error})"
        failure = distributed.all_gather(failure, self.session.world)[0]
        if failure:
            raise SaveError(
                f"{failure}. Free space, then type the {same_command(self.config)}: it continues "
                f"from step {max(self.saver.saved_step, 0)}."
            )


@dataclass
class Phase:
    """One phase: its optimizer, loss and KL reference."""

    run: Run
    index: int
    length: int
    config: PhaseConfig
    loss: LossSpec
    optimizer: torch.optim.Optimizer
    reference: Policy | None
    entropy: EntropyWatch
    plan: UpdatePlan
    line: PhaseLine
    mismatch: MismatchCheck

    def steps(self) -> Iterator[int]:
        """The 0-based steps of the phase that are not done."""
        self._first = self.run.progress.phase_steps
        if self._first:  # when a signal or an error came before these
            self._probe(self._first)
            self._evaluate(self._first)
        self.run.reporter.begin(self.line.begin(self._first))
        timing.enter(timing.COLD_START if self.config.algorithm == "sft" else "")
        timing.lap()  # the first step's seconds begin here
        for step in range(self._first, self.length):
            timing.begin_step(self.run.progress.step + 1)
            coefs = self.entropy.coefs(step, self.loss.stage_coefs)
            self.loss = replace(self.loss, stage_coefs=coefs)
            yield step

    def finish_step(self, step: int, metrics: Metrics, batch: Experience) -> None:
        """After the update: sync, check, log, evaluate, save.

        Raises:
            MismatchError: the first batch was sampled from other weights.
            EntropyExplosionError: a stage's entropy explodes (the state is saved).
            NonFiniteError: too many updates in a row were skipped (the state is saved).
            Stopped: a signal came (the state is saved).
        """
        run = self.run
        session = run.session
        caps = (*run.progress.caps[: self.index], step + 1)
        run.progress = replace(
            run.progress,
            phase=self.index,
            phase_steps=step + 1,
            step=run.progress.step + 1,
            caps=caps,
            is_phase_end=False,
            controllers={**run.progress.controllers, "nonfinite": run.guard.state_dict()},
        )
        with timing.timer("sync"):
            session.engine.sync(session.policy.model, run.progress.step)
        verdict = self._watch_entropy(step, metrics)
        self._log(step, metrics, batch)
        run.progress = run.saver.count_reward(run.progress, metrics.get("reward"))
        self._check_finite()
        self._check(metrics, verdict)
        self._probe(step + 1)
        self._evaluate_and_save(step + 1)

    def _evaluate_and_save(self, done: int) -> None:
        run, config = self.run, self.run.config
        every = config.checkpoint.every
        regular = bool(every) and run.progress.step % every == 0 and done < self.length
        signum = distributed.all_max(run.stop.received, run.session.world)
        if signum:  # the evaluation follows when the run continues
            if not run.save(self.optimizer, regular=regular):
                raise SaveError(f"stopped by signal {signum}; step {run.progress.step} is lost")
            raise Stopped(f"signal {signum}")
        self._evaluate(done)
        is_best = done < self.length and run.saver.is_best(run.progress, run.scores())
        if regular or is_best:
            run.save(self.optimizer, regular=regular)

    def _probe(self, done: int) -> None:
        every = self.run.config.report.probe_every
        if self.config.algorithm != "sft" and is_due(done, every):
            self.run.probes.answer(self.run.progress.step)

    def _evaluate(self, done: int) -> None:
        every = self.run.config.eval.every
        if every and self.config.algorithm != "sft" and done % every == 0:
            self.run.evaluate(f"step_{self.run.progress.step}")

    def _check_finite(self) -> None:
        guard, checkpoints = self.run.guard, self.run.folder.checkpoints
        if guard.is_exhausted:
            raise guard.error(self.run.save(self.optimizer), checkpoints)

    def _check(self, metrics: Metrics, verdict: Verdict) -> None:
        run = self.run
        self.mismatch.update(metrics)
        for message in verdict.warnings:
            run.reporter.warning(message)
        if verdict.stop is not None:
            run.save(self.optimizer)
            raise EntropyExplosionError(verdict.stop)

    def _watch_entropy(self, step: int, metrics: Metrics) -> Verdict:
        run, count = self.run, len(self.loss.stage_coefs)
        verdict = self.entropy.update(metrics, count, step=step, at=run.progress.step)
        controllers = {**run.progress.controllers, **self.entropy.state_dict()}
        run.progress = replace(run.progress, controllers=controllers)
        return verdict

    def _log(self, step: int, metrics: Metrics, batch: Experience) -> None:
        run = self.run
        world = run.session.world
        metrics.update(batch.sums.means())
        metrics.update(tokens_and_seconds(batch, world, self.plan.passes(metrics)))
        metrics["seconds"] = run.seconds
        for k, coef in enumerate(self.loss.stage_coefs):
            metrics[f"stage_coef/{k}"] = coef
        record = {"step": run.progress.step, "phase": self.config.algorithm, "phase_step": step + 1}
        record["lr"] = self.optimizer.param_groups[0]["lr"]
        run.metrics.write({**record, **metrics})
        run.trackers.metrics({**record, **metrics})
        if batch.trace is not None:
            for sample in batch.trace.records():
                run.samples.write({**record, **sample})
        if step == self._first and (text := score_head.sentence(metrics)):
            run.reporter.line(text)
        run.reporter.step(
            self.line.after(step + 1, metrics, run.evaluations.results),
            first=step == self._first,
            last=step + 1 == self.length,
        )


def _start(run: Run, index: int, length: int) -> Phase:
    """Build a phase; the KL reference is the policy as it was when the phase began."""
    session, config, resume = run.session, run.config.phases[index], run.resume
    continues = resume.path is not None and index == resume.progress.phase
    model = session.policy.model
    spec = loss_spec(run.config, config, session.task.grammar.coefs())
    optimizer = build_optimizer(model, run.config.optim)
    if continues and resume.phase_start is not None:
        checkpoint.load_model(resume.phase_start, model)
    reference = session.reference() if spec.objective.kl_coef > 0 else None
    entropy = EntropyWatch.build(run.config.entropy, config, session.task.grammar)
    if continues and resume.path is not None:
        with timing.timer("load"):
            checkpoint.load_model(resume.path, model)
            checkpoint.load_optimizer(resume.path, model, optimizer)
        checkpoint.load_controller(entropy, run.progress.controllers, resume.path)
        run.reporter.line(f"resumed from {resume.path} (step {resume.progress.step})")
    else:
        run.progress = replace(run.progress, phase=index, phase_steps=0, controllers={})
    with timing.timer("sync"):
        session.engine.sync(model, run.progress.step)
    run.reporter.line(
        f"phase {index + 1}/{len(run.config.phases)}: {config.algorithm}, {length} steps"
    )
    plan = update_plan(run.config, config)
    line = PhaseLine(
        config.algorithm,
        length,
        session.task.grammar.names,
        floor=run.config.entropy.alarm_floor,
        records=_records(run, resume.progress.phase_steps) if continues else (),
    )
    mismatch = MismatchCheck.of(run.config.rollout, session.engine.renormalises)
    return Phase(
        run=run,
        index=index,
        length=length,
        config=config,
        loss=spec,
        optimizer=optimizer,
        reference=reference,
        entropy=entropy,
        plan=plan,
        line=line,
        mismatch=mismatch,
    )


def _records(run: Run, count: int) -> list[dict[str, Any]]:
    return run.metrics.read()[-count:] if count else []
