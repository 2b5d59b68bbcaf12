"""Fixed rows of the test split, answered greedily every some steps: how one answer changes.

The records go to samples.jsonl beside the sampled ones (`traces`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crpo_fast import distributed
from crpo_fast.batch import Row
from crpo_fast.config import Config
from crpo_fast.loss import kernel_options, scoring_options
from crpo_fast.metrics import JsonLines
from crpo_fast.packing import MicroBatch, Sequence, pack
from crpo_fast.session import Session
from crpo_fast.task import stratified
from crpo_fast.timing import timer
from crpo_fast.traces import numbers, sample_record
from crpo_kernels import linear_logprobs


def probe_rows(rows: list[Row], count: int) -> list[Row]:
    """``count`` fixed rows, spread over the data sets; a function of the rows alone."""
    names = {row.dataset_id for row in rows}
    if count <= 0 or not rows:
        return []
    chosen = stratified(rows, -(-count // len(names)))
    return [chosen[i * len(chosen) // count] for i in range(min(count, len(chosen)))]


class Probes:
    """The probe rows of a run and the log to which their answers go.

    Every rank answers all of them: the engine's gathering of weights needs all ranks.
    """

    def __init__(self, session: Session, log: JsonLines) -> None:
        self._session, self._log, self._answered = session, log, -1
        self.rows = probe_rows(session.task.rows.test, session.config.report.probe_prompts)

    def state_dict(self) -> dict[str, int]:
        """The step whose answers stand in the log last."""
        return {"answered": self._answered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up a saved state."""
        self._answered = int(state["answered"])

    def answer(self, step: int) -> None:
        """Answer with the weights of ``step``, once; a collective, rank 0 writes."""
        if not self.rows or self._answered == step:
            return
        self._answered = step
        with timer("probes"):
            for record in self._records():
                self._log.write({"step": step, **record})

    def _records(self) -> list[dict[str, Any]]:
        session, task = self._session, self._session.task
        prompts = [task.prompt(row)[0] for row in self.rows]
        groups = session.engine.generate(prompts, 1, session.greedy(), seed=0)
        samples = [group.samples[0] for group in groups]
        sequences = [
            Sequence(g.prompt_ids, s.token_ids, [-1] * len(s.token_ids))
            for g, s in zip(groups, samples, strict=True)
        ]
        logprobs, entropy = _forward(session, sequences)
        records = []
        for i, (row, sample) in enumerate(zip(self.rows, samples, strict=True)):
            record = sample_record(task, row, sample, kind="probe", probe=i)
            record |= {"logprobs": numbers(logprobs[i]), "entropy": numbers(entropy[i])}
            del record["rollout_logprobs"]
            records.append(record)
        return records


@torch.no_grad()
def _forward(session: Session, sequences: list[Sequence]) -> tuple[list[Tensor], list[Tensor]]:
    """Logprobs and entropies of every completion token, at the temperature of the rollouts."""
    policy, train = session.policy, session.config.train
    lengths = [len(s.completion_ids) for s in sequences]
    flat = torch.zeros(2, sum(lengths), dtype=torch.float64)
    budget = max(train.token_budget, *map(len, sequences))  # eval.max_tokens may be larger
    batches = pack(sequences, budget, layout=train.layout)
    was_training = policy.model.training
    policy.model.eval()
    for batch in batches:
        values = _head(session, batch.to(policy.world.device))  # [2, R]
        flat[:, batch.source] = values.cpu().double()
        distributed.reshard(policy.model)
    policy.model.train(was_training)
    logprobs, entropy = flat
    return list(logprobs.split(lengths)), list(entropy.split(lengths))


def _head(session: Session, batch: MicroBatch) -> Tensor:
    config = session.config

    def compute(hidden: Tensor, weight: Tensor, **head: Any) -> Tensor:
        out = linear_logprobs(
            hidden,
            weight,
            batch.labels,
            rows=range(batch.labels.numel()),
            temperature=config.rollout.temperature,
            **_options(config),
            **head,
        )
        return torch.stack((out.logprobs, out.entropy))

    return session.policy(batch, compute)


def _options(config: Config) -> dict[str, Any]:
    """Of a pass without gradients, with the head as it is: what is shown is exact."""
    options = {**kernel_options(config), **scoring_options(config)}
    options.pop("head_dtype", None)
    return options
