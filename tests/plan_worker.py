"""Live tensor bytes of one real step, moment by moment; started by torchrun at 2 ranks.

    python tests/plan_worker.py <result.json> <config.toml> <prompt tokens> <completion tokens> ...

The step is the trainer's own: its policy, engine, micro-batches, update and checkpoint.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from crpo_fast import checkpoint, distributed
from crpo_fast import policy as policies
from crpo_fast.batch import SamplingParams
from crpo_fast.checkpoint import Progress
from crpo_fast.config import Config, parse_arguments
from crpo_fast.distributed import World
from crpo_fast.live_bytes import LiveBytes, storage_bytes
from crpo_fast.loss import loss_spec
from crpo_fast.optim import build_optimizer
from crpo_fast.packing import Sequence
from crpo_fast.policy import Policy
from crpo_fast.rollout.static import StaticEngine
from crpo_fast.session import DTYPES, built_model
from crpo_fast.step import micro_batches, optimizer_step
from crpo_fast.task import build_grammar
from crpo_fast.updates import update_plan


class RealStep:
    """One rank of the last phase of a config."""

    def __init__(self, config: Config, world: World, prompt: int, completion: int) -> None:
        self.config, self.world, self.prompt, self.completion = config, world, prompt, completion
        self.phase, model = config.phases[-1], config.model
        self.spec = loss_spec(config, self.phase, build_grammar(config).coefs())
        self.policy = self.make_policy(
            activation_checkpointing=model.activation_checkpointing, freeze_head=model.freeze_head
        )
        self.reference: Policy | None = None
        if self.spec.objective.kl_coef > 0:
            self.reference = self.make_policy(trainable=False)
        self.optimizer = build_optimizer(self.policy.model, config.optim)

    def make_policy(self, **options: Any) -> Policy:
        dtype = DTYPES[self.config.model.compute_dtype]
        model = built_model(self.config, self.config.model.build.vocab_size, "sdpa_packed")
        if "trainable" in options:
            model = model.to(dtype)
        return policies.create(model, self.world, compute_dtype=dtype, **options)

    def sequences(self) -> list[Sequence]:
        """As many as the config says; the last one a token shorter, as rows differ in length."""
        rollout = self.config.rollout
        count = rollout.prompts_per_step // self.world.size * rollout.group_size
        vocabulary = self.config.model.build.vocab_size
        ids = torch.randint(0, vocabulary, (count, self.prompt + self.completion)).tolist()
        made = []
        for i, row in enumerate(ids):
            answer = row[self.prompt + (i == count - 1) :]
            n = len(answer)
            made.append(Sequence(row[: self.prompt], answer, [0] * n, [-1.0] * n, float(i % 2)))
        return update_plan(self.config, self.phase).split(made)[0]

    def update(self) -> None:
        train = self.config.train
        batches = micro_batches(
            self.sequences(), self.spec, self.policy, token_budget=train.token_budget,
            layout=train.layout, reference=self.reference,
        )  # fmt: skip
        self.between(batches)
        optimizer_step(self.policy, self.optimizer, batches, self.spec, max_grad_norm=1.0)

    def between(self, batches: Any) -> None:
        """Called between the reference pass and the update."""

    def rollout(self) -> None:
        rollout = self.config.rollout
        engine = StaticEngine(self.policy.model, gathered=self.policy.gathered)
        engine.sync(self.policy.model, 0)
        count = rollout.prompts_per_step // self.world.size
        prompts = [[1 + i] * (self.prompt - (i == 0)) for i in range(count)]
        params = SamplingParams(
            self.completion, (), rollout.temperature, rollout.top_p, rollout.top_k
        )
        engine.generate(prompts, rollout.group_size, params, seed=0)


def measure(config: Config, world: World, prompt: int, completion: int) -> dict[str, Any]:
    """Bytes at the peak of every moment, by label; and what the parts hold between steps."""
    step = RealStep(config, world, prompt, completion)
    step.update()  # makes the optimizer's state
    model = step.policy.model
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    states = [v for s in step.optimizer.state.values() for v in s.values()]
    found: dict[str, Any] = {}
    with LiveBytes(p.shape for p in parameters if p.ndim == 2) as counter:
        counter.add([*parameters, *model.buffers()], "weights, sharded")
        counter.add(states, "optimizer")
        if step.reference is not None:
            copy = step.reference.model
            counter.add([*copy.parameters(), *copy.buffers()], "KL reference")

        def taken(name: str) -> None:
            found[name] = dict(counter.at_peak)
            counter.restart()

        def between(_batches: Any) -> None:
            if step.reference is not None:
                taken("reference pass")

        step.between = between
        counter.restart()
        step.rollout()
        taken("rollout")
        plain = step.optimizer.step

        def before_step(*args: Any, **kwargs: Any) -> Any:
            taken("forward, backward")
            counter.add([p.grad for p in trainable], "gradients, sharded")
            counter.restart()
            found["gradients"] = storage_bytes(p.grad for p in trainable)
            return plain(*args, **kwargs)

        step.optimizer.step = before_step
        step.update()
        taken("optimizer")
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder), model, step.optimizer, Progress(), world)
        taken("save")
    found["weights"] = storage_bytes([*parameters, *model.buffers()])
    found["optimizer state"] = storage_bytes(states)
    return found


def main() -> None:
    result, config, prompt, completion, *rest = sys.argv[1:]
    world = distributed.init(threads=1)
    found = measure(parse_arguments([config, *rest]), world, int(prompt), int(completion))
    everyone = distributed.all_gather(found, world)
    if world.is_main:
        Path(result).write_text(json.dumps(everyone), encoding="utf-8")
    distributed.shutdown()


if __name__ == "__main__":
    main()
