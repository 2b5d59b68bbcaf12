"""What a run leaves besides its checkpoints: evaluations, final/, summary.json, curves."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from crpo_fast import lora, models, outcome, provenance
from crpo_fast.model_card import write_card
from crpo_fast.run_folder import RunFolder, phase_lengths
from crpo_fast.session import DTYPES

if TYPE_CHECKING:
    from crpo_fast.phases import Run


class Evaluations:
    """evaluations.json: results by name, each with the step of the weights it is of.

    Args:
        folder: of the run.
        count: results that stay; later ones will be made again.
        enabled: write the file (rank 0).
    """

    name = "evaluations.json"

    def __init__(self, folder: RunFolder, count: int, *, enabled: bool) -> None:
        self.results = dict(list(folder.read_evaluations().items())[:count])
        self._folder, self._enabled, self._is_written = folder, enabled, False

    @property
    def position(self) -> int:
        """How many results there are."""
        return len(self.results)

    def get(self, name: str, step: int) -> dict[str, Any] | None:
        """The result ``name`` if it is of ``step``."""
        result = self.results.get(name)
        return result if result is not None and result["step"] == step else None

    def add(self, name: str, step: int, result: dict[str, Any]) -> dict[str, Any]:
        """Take in a result; the file is written by ``sync``."""
        self.results.pop(name, None)  # an "after" of a shorter run: the order tells the age
        self.results[name] = {**result, "step": step}
        self._is_written = False
        return self.results[name]

    def scores(self, step: int) -> dict[str, float]:
        """Weighted F1 of the trained weights of ``step``, by metric; empty: not evaluated."""
        found = [e for n, e in self.results.items() if e["step"] == step and n != "untrained"]
        return {"weighted_f1": found[-1]["weighted_f1"]} if found else {}

    def sync(self) -> str:
        """Write the file if something changed; why that failed, or ""."""
        if self._enabled and self.results and not self._is_written:
            try:
                self._folder.write_json(self.name, self.results)
            except OSError as error:
                return f"{self.name} could not be written ({error.strerror})"
            self._is_written = True
        return ""


def _card(run: Run) -> str:
    session, world = run.session, run.session.world
    facts = {
        "parameters": sum(p.numel() for p in session.policy.model.parameters()),
        "ranks": world.size,
        "machine": provenance.machine(world.device.type),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "seconds": run.seconds,
    }
    return write_card(run.config, session.task.rows, run.evaluations.results, facts=facts)


def write_results(run: Run, after: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """The transformers export, the curves, summary.json and the closing lines (rank 0).

    Raises:
        OSError, SafetensorError: a file could not be written.
    """
    failed = [reason for log in run.logs if (reason := log.sync())]
    if failed:
        raise OSError("; ".join(failed))
    session, results = run.session, run.evaluations.results
    model: Any = session.policy.model
    if (settings := lora.settings_of(model)) is not None:
        lora.write_adapter(model, weights, run.folder.path / "adapter")
        weights, model = lora.merged(weights, settings), lora.plain_model(model)
    models.export_model(
        model,
        session.task.tokenizer,
        run.folder.path / "final",
        state_dict=weights,
        dtype=DTYPES[run.config.model.compute_dtype],
        card=_card(run),
    )
    summary = {
        "seconds": round(run.seconds, 1),
        "seed": run.config.seed,
        "before": outcome.scores(results.get("before", after)),
        "after": outcome.scores(after),
        "phase_steps": phase_lengths(run.config),
    }
    if run.progress.best is not None:
        summary["best"] = asdict(run.progress.best)
    if "untrained" in results:
        summary["untrained"] = outcome.scores(results["untrained"])
    outcome.write_plots(run.metrics.read(), session.task.grammar.names, run.folder.path / "plots")
    run.folder.write_json("summary.json", summary)
    outcome.show(summary, run.folder.path, run.reporter)
