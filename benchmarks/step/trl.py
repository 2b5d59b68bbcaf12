"""TRL's training phase of one optimizer step: its GRPOTrainer, given the rollouts.

`Trainer.train` of transformers runs as it is, with TRL's own training_step, _prepare_inputs
(shuffle and split of the rollout), compute_loss, clipping and optimizer. Only sampling and scoring
(`_generate_and_score_completions`) are replaced: the completions and their advantages are given,
padded by TRL's `pad` as it pads them, and the reference pass is made by the method that it calls.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback

from .case import StepCase, load, make_sequences
from .parts import Timeline
from .worker import Finished, Steps

PAD_ID, MOST_STEPS = 0, 10_000


def settings(case: StepCase, folder: str, *, liger: bool) -> Any:
    """The GRPOConfig that asks for what our loop does."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        max_steps=MOST_STEPS,
        per_device_train_batch_size=case.micro_batch,
        gradient_accumulation_steps=case.num_sequences // case.micro_batch,
        num_generations=case.group_size,
        max_completion_length=case.max_completion,
        loss_type=case.objective,
        epsilon=0.2,
        epsilon_high=0.28 if case.objective == "dapo" else 0.2,
        beta=case.kl_coef,
        use_bias_correction_kl=False,  # k3 as it stands; True gives k3 the gradient of k2
        temperature=1.0,
        learning_rate=case.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=case.dtype == "bfloat16",
        gradient_checkpointing=case.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=liger,
        use_cpu=case.device == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=case.seed,
    )


def trainer_class(case: StepCase, timeline: Timeline) -> Any:
    """GRPOTrainer with given rollouts."""
    from trl import GRPOTrainer
    from trl.trainer.utils import pad

    class GivenRollouts(GRPOTrainer):
        losses: list[torch.Tensor]

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            del inputs
            batch, device = {}, self.accelerator.device
            for name, side in (("prompt", "left"), ("completion", "right")):
                ids = [torch.tensor(getattr(s, f"{name}_ids")) for s in self.rollouts]
                masks = [torch.ones_like(x) for x in ids]
                for kind, value, tensors in (("ids", PAD_ID, ids), ("mask", 0, masks)):
                    padded = pad(tensors, padding_value=value, padding_side=side)
                    batch[f"{name}_{kind}"] = padded.to(device)
            batch["advantages"] = torch.tensor([s.advantage for s in self.rollouts], device=device)
            batch["num_items_in_batch"] = batch["completion_mask"].sum()
            if self.beta:
                with timeline.part("reference"):
                    batch["ref_per_token_logps"] = self._reference(batch)
            return batch

        @torch.no_grad()
        def _reference(self, batch: dict[str, Any]) -> torch.Tensor:
            ids, mask = (
                torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], 1)
                for kind in ("ids", "mask")
            )
            logprobs, _, _ = self._get_per_token_logps_and_entropies(
                self.ref_model, ids, mask, batch["completion_ids"].shape[1], case.micro_batch
            )
            return logprobs

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.losses.append(loss)
            return loss

    return GivenRollouts


class Trl:
    """TRL's trainer for one case."""

    def __init__(self, case: StepCase, timeline: Timeline, *, liger: bool = False) -> None:
        from datasets import Dataset

        torch.set_num_threads(case.threads)
        self.timeline = timeline
        model = load(case.folder, case.attention)
        model.config._name_or_path = case.reference  # from where TRL loads the KL reference
        words = Tokenizer(models.WordLevel({"<pad>": PAD_ID, "<eos>": 1, "a": 2}, "<pad>"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
        )
        self.folder = tempfile.TemporaryDirectory()
        self.trainer = trainer_class(case, timeline)(
            model,
            lambda completions, **_: [0.0] * len(completions),
            settings(case, self.folder.name, liger=liger),
            Dataset.from_dict({"prompt": ["a"] * case.prompts}),
            processing_class=tokenizer,
        )
        self.trainer.rollouts = make_sequences(case, model.config.vocab_size)
        self.trainer.losses = []
        self._watch()

    def _watch(self) -> None:
        timeline, trainer = self.timeline, self.trainer
        timeline.watch_backward()
        timeline.watch_blocks(trainer.model.base_model)
        timeline.wrap(trainer, "_prepare_inputs", "packing")
        timeline.wrap(trainer, "compute_loss", "metrics")
        timeline.wrap(trainer, "_clip_grad_norm", "optimizer")
        timeline.wrap(trainer.model, "zero_grad", "optimizer")

    def run(self, steps: Steps) -> None:
        """Steps as long as they are asked for."""
        self.trainer.add_callback(callback(self.trainer, self.timeline, steps))
        try:
            self.trainer.train()
        except Finished:
            self.folder.cleanup()


def callback(trainer: Any, timeline: Timeline, steps: Steps) -> TrainerCallback:
    """Waits for the request before each optimizer step and answers it after."""

    class Watch(TrainerCallback):
        norm: Any = None

        def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
            # accelerate has wrapped the model's forward and the optimizer by now
            model, optimizer = trainer.model, kwargs["optimizer"]
            parameters = dict(model.named_parameters())
            frozen = [] if trainer.ref_model is None else list(trainer.ref_model.parameters())
            steps.knows(parameters, optimizer.optimizer, frozen)
            timeline.wrap(model, "forward", "blocks_forward")
            timeline.wrap(optimizer, "step", "optimizer")
            clip = trainer._clip_grad_norm

            def keep_norm(model: Any) -> Any:
                self.norm = clip(model)
                return self.norm

            trainer._clip_grad_norm = keep_norm

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            trainer.losses.clear()
            if not steps.begin():
                raise Finished

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            named = trainer.model.named_parameters()
            steps.gradients({name: p.grad for name, p in named})

        def on_step_end(self, *_: Any, **__: Any) -> None:
            loss = torch.stack(trainer.losses).sum()
            steps.end(loss=loss, grad_norm=self.norm)

    return Watch()
