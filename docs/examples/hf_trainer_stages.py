"""Hugging Face's Trainer with stage entropy: GRPO's loss on written rollouts, two stages apart.

The first stage of a completion is pressed to explore (negative coefficient: more entropy), the
second one to commit. It needs accelerate. Run it: python docs/examples/hf_trainer_stages.py
"""

import tempfile
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from crpo_fast.integrations.causal_lm import add_fused_head
from crpo_kernels import (
    IGNORE_INDEX,
    ObjectiveSpec,
    aggregation_weights,
    linear_policy_loss,
    stage_entropy_weights,
)

VOCAB, LENGTH, PROMPT, SECOND = 32, 14, 4, 9  # the second stage begins at SECOND
THINK, ANSWER = 0, 1  # tokens that open the stages
COEFS = (-1.0, 1.0)
CONFIG = LlamaConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, initializer_range=0.25,
)  # fmt: skip


def make_rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Rollouts as another program may have written them: ids, stages and an advantage a sequence.

    Stages are of the predicted token, as labels are: -1 in the prompt, then 0 and 1.
    """
    places = torch.arange(LENGTH)
    stages = torch.where(places < SECOND, 0, 1)
    stages[(places < PROMPT) | (places == LENGTH - 1)] = -1
    rows = []
    for _ in range(count):
        ids = torch.randint(2, VOCAB, (LENGTH,))
        ids[PROMPT], ids[SECOND] = THINK, ANSWER
        labels = ids.roll(-1).masked_fill(stages == -1, IGNORE_INDEX)
        advantages = torch.randn(()).expand(LENGTH)
        rows.append(
            {"input_ids": ids, "labels": labels, "stage_ids": stages, "advantages": advantages}
        )
    return rows


class StageTrainer(Trainer):
    """The weights hold the counts of a whole optimizer step, on all ranks; nothing else divides."""

    loss_is_scaled_for_ga = True  # gradients of micro-batches add up

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """The fused loss, through the model's own forward and whatever is wrapped around it."""
        ranks = self.accelerator.num_processes
        sequences = self.args.train_batch_size * self.args.gradient_accumulation_steps * ranks
        labels, stages = inputs["labels"], inputs["stage_ids"]
        bounds = torch.arange(0, labels.numel() + 1, labels.shape[1], device=labels.device)
        tokens = aggregation_weights(
            labels != IGNORE_INDEX, bounds, aggregation="sequence_mean", num_sequences=sequences
        )
        entropy = stage_entropy_weights(stages, bounds, COEFS, num_sequences=sequences)
        loss_of = partial(
            linear_policy_loss, labels=labels, advantages=inputs["advantages"],
            token_weights=tokens * ranks, entropy_weights=entropy * ranks,
            spec=ObjectiveSpec.preset("grpo"),
        )  # fmt: skip
        loss, stats = model(input_ids=inputs["input_ids"], head=loss_of)
        entropies = [stats.entropy[stages.flatten() == k].mean().item() for k in range(len(COEFS))]
        print("entropy of the stages: " + " ".join(f"{value:.3f}" for value in entropies))
        return loss


def main() -> None:
    """Train and print the entropies of both stages, nats, for every micro-batch."""
    torch.manual_seed(0)
    model = add_fused_head(LlamaForCausalLM(CONFIG))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            max_steps=30, learning_rate=1e-2, remove_unused_columns=False, report_to=[],
            logging_strategy="no", save_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        StageTrainer(model, arguments, train_dataset=make_rows(80)).train()


if __name__ == "__main__":
    main()
