"""Our training phase of one optimizer step: the trainer's own functions, called as it calls them.

train.train makes of a rollout: micro_batches (with the reference pass) -> add_old_logprobs ->
run_updates. This does the same on made-up rollouts and adds hooks for the time of the parts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from crpo_fast import attention, distributed, policy, step, updates
from crpo_fast.config import OptimConfig
from crpo_fast.live_bytes import local
from crpo_fast.loss import AGGREGATION, LossSpec
from crpo_fast.metrics import Sums
from crpo_fast.nonfinite import Guard
from crpo_fast.optim import build_optimizer
from crpo_kernels import ObjectiveSpec

from .case import NUM_STAGES, StepCase, distribution, load, make_sequences
from .parts import Timeline
from .worker import Steps

IMPLEMENTATION = {"sdpa": attention.SDPA_PACKED}  # our packed rows' way to the same sdpa
# of FSDP: gather and cast a unit's weights, drop them, reduce its gradients
SHARDING = ("unshard", "wait_for_unshard", "reshard", "post_backward", "finalize_backward")


class Ours:
    """Policy, reference, optimizer and loss of `crpo_fast` for one case."""

    def __init__(self, case: StepCase, timeline: Timeline) -> None:
        self.case, self.timeline = case, timeline
        self.world = distributed.init(threads=case.threads)
        self.policy = self._model(case.folder, torch.float32, trainable=True)
        self.reference = None
        if case.kl_coef:
            self.reference = self._model(case.reference, case.torch_dtype, trainable=False)
        settings = OptimConfig(lr=case.learning_rate)
        self.optimizer = build_optimizer(self.policy.model, settings)
        self.max_grad_norm = settings.max_grad_norm
        self.sequences = make_sequences(case, self.policy.model.config.vocab_size)
        self.token_budget = token_budget(case, self.sequences)
        self.spec = LossSpec(
            ObjectiveSpec.preset(case.objective, kl_coef=case.kl_coef),
            AGGREGATION[case.objective],
            stage_coefs=(0.0,) * NUM_STAGES,
            group=case.num_sequences,
        )
        self.guard = Guard(3, Path(tempfile.gettempdir()) / "nonfinite", self.world, print)
        self._watch()

    def _model(self, folder: str, dtype: torch.dtype, *, trainable: bool) -> policy.Policy:
        implementation = IMPLEMENTATION.get(self.case.attention, self.case.attention)
        return policy.create(
            load(folder, implementation, dtype),
            self.world,
            compute_dtype=self.case.torch_dtype,
            activation_checkpointing=self.case.checkpointing,
            trainable=trainable,
        )

    def _watch(self) -> None:
        timeline, model = self.timeline, self.policy.model
        timeline.watch_backward()
        timeline.watch_blocks(model.base_model)
        timeline.wrap(model, "policy_forward", "blocks_forward")
        timeline.wrap(policy.Policy, "score", "reference")
        timeline.wrap(self.optimizer, "step", "optimizer")
        timeline.wrap(self.optimizer, "zero_grad", "optimizer")
        timeline.wrap(distributed, "clip_grad_norm", "optimizer")
        for name in SHARDING:
            timeline.wrap(FSDPParamGroup, name, "sharding")
        timeline.wrap(step, "_add_stats", "metrics")
        timeline.wrap(updates, "finish_mismatch", "metrics")
        for name in ("add", "merge", "means", "reduced"):
            timeline.wrap(Sums, name, "metrics")

    def step(self) -> dict[str, float | None]:
        """Train once on the rollouts; the step's metrics."""
        with self.timeline.part("packing"):
            batches = step.micro_batches(
                self.sequences,
                self.spec,
                self.policy,
                token_budget=self.token_budget,
                layout=self.case.layout,
                reference=self.reference,
            )
        packed = updates.add_old_logprobs([batches], self.spec, self.policy)
        return updates.run_updates(
            self.policy,
            self.optimizer,
            packed,
            self.spec,
            updates=1,
            max_grad_norm=self.max_grad_norm,
            guard=self.guard,
            where="step",
        )

    def run(self, steps: Steps) -> None:
        """Steps as long as they are asked for."""
        for _ in self._asked(steps):
            metrics = self.step()
            steps.end(loss=metrics["loss"], grad_norm=metrics["grad_norm"])

    def _asked(self, steps: Steps) -> Iterator[None]:
        parameters = dict(self.policy.model.named_parameters())
        frozen = [] if self.reference is None else list(self.reference.model.parameters())
        steps.knows(parameters, self.optimizer, frozen)

        def before(optimizer: Any, args: Any, kwargs: Any) -> None:
            del optimizer, args, kwargs
            steps.gradients({name: _gradient(p) for name, p in parameters.items()})

        self.optimizer.register_step_pre_hook(before)
        while steps.begin():
            yield


def token_budget(case: StepCase, sequences: list[Any]) -> int:
    """As many token slots as a padded micro-batch of ``micro_batch`` sequences takes."""
    found = distribution(sequences, case.micro_batch)
    return case.micro_batch * found["padded"] // found["sequences"]


def _gradient(parameter: Tensor) -> Tensor | None:
    return None if parameter.grad is None else local(parameter.grad)
