"""A GRPO batch for a small Llama: its loss from all logits, and the same by `add_fused_head`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from crpo_fast.integrations.causal_lm import HeadFunction, add_fused_head
from crpo_kernels import (
    IGNORE_INDEX,
    ObjectiveSpec,
    aggregation_weights,
    linear_policy_loss,
    stage_entropy_weights,
)

Batch = dict[str, Tensor]
SPEC = ObjectiveSpec.preset("dapo")
NUM_SEQUENCES, LENGTH, PROMPT = 4, 12, 3
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "vocab_size": 61,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def make_model(
    tied: bool = False, dtype: torch.dtype = torch.float64, layers: int = 2
) -> LlamaForCausalLM:
    """The same numbers in every dtype; norms away from one."""
    torch.manual_seed(1)
    sizes = {**SIZES, "num_hidden_layers": layers, "tie_word_embeddings": tied}
    model = LlamaForCausalLM(LlamaConfig.from_dict(sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def make_batch(dtype: torch.dtype = torch.float64) -> Batch:
    """Right-padded sequences with three stages each; weights hold the counts of all of them."""
    generator = torch.Generator().manual_seed(2)
    shape = (NUM_SEQUENCES, LENGTH)
    input_ids = torch.randint(1, SIZES["vocab_size"], shape, generator=generator)
    ends = torch.tensor([12, 7, 9, 11])
    places = torch.arange(LENGTH)
    labels = input_ids.roll(-1, 1)
    labels[(places < PROMPT - 1) | (places + 1 >= ends[:, None])] = IGNORE_INDEX
    counted = labels != IGNORE_INDEX
    stages = torch.where(counted, (places - PROMPT + 1).clamp(min=0) // 3, -1)
    bounds = torch.arange(0, NUM_SEQUENCES * LENGTH + 1, LENGTH)
    entropy_weights = stage_entropy_weights(
        stages, bounds, torch.tensor([-0.3, 0.2, 0.5]).to(dtype)
    )
    return {
        "input_ids": input_ids,
        "attention_mask": (places < ends[:, None]).long(),
        "labels": labels,
        "advantages": torch.randn(NUM_SEQUENCES, 1, generator=generator).to(dtype).expand(shape),
        "old_logprobs": torch.randn(shape, generator=generator).to(dtype) * 0.3 - 4.2,
        "token_weights": aggregation_weights(counted.to(dtype), bounds).view(shape),
        "entropy_weights": entropy_weights.view(shape),
    }


def part(batch: Batch, index: int, count: int, times: int = 1) -> Batch:
    """One of ``count`` parts; weights ``times`` what they were, for wrappers that average."""
    cut = {name: value.chunk(count)[index].contiguous() for name, value in batch.items()}
    return {name: v * times if name.endswith("_weights") else v for name, v in cut.items()}


def plain_loss(model: Any, batch: Batch) -> Tensor:
    """Loss from the model's logits, written down without the kernels."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_p = logits.log_softmax(-1)
    picked = log_p.gather(-1, batch["labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    ratio = (picked - batch["old_logprobs"]).exp()
    gain = torch.minimum(ratio * batch["advantages"], ratio.clamp(0.8, 1.28) * batch["advantages"])
    return (batch["entropy_weights"] * entropy - batch["token_weights"] * gain).sum()


def fused_head(batch: Batch) -> HeadFunction:
    """What the user writes: the loss of hidden states and the head's weight."""

    def loss_of(hidden: Tensor, weight: Tensor, **options: Any) -> Any:
        return linear_policy_loss(
            hidden,
            weight,
            batch["labels"],
            advantages=batch["advantages"],
            old_logprobs=batch["old_logprobs"],
            token_weights=batch["token_weights"],
            entropy_weights=batch["entropy_weights"],
            spec=SPEC,
            **options,
        )

    return loss_of


def fused_loss(model: Any, batch: Batch) -> Tensor:
    """The loss of a model with `add_fused_head`, through whatever is wrapped around it."""
    loss, _ = model(
        batch["input_ids"], attention_mask=batch["attention_mask"], head=fused_head(batch)
    )
    return loss


def trained(model: Any) -> dict[str, Tensor]:
    """Parameters by name, tied ones once."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def step(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """The gradients of ``loss``, by name."""
    model.zero_grad()
    loss.backward()
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def trained_by_trainer(batch: Batch, folder: str, ranks: int, **options: Any) -> dict[str, Tensor]:
    """What one SGD step of rate 1 takes from the parameters, in transformers' Trainer."""

    class FusedTrainer(Trainer):
        loss_is_scaled_for_ga = True  # divide nothing

        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            return fused_loss(model, part(inputs, 0, 1, times=ranks))

    arguments = TrainingArguments(
        output_dir=folder, max_steps=1, remove_unused_columns=False, report_to=[], use_cpu=True,
        max_grad_norm=0.0, disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip
    model = add_fused_head(make_model())
    before = trained(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(NUM_SEQUENCES)]
    FusedTrainer(
        model, arguments, train_dataset=rows, optimizers=(optimizer, constant),
        data_collator=lambda some: {k: torch.stack([row[k] for row in some]) for k in some[0]},
    ).train()  # fmt: skip
    return {name: before[name] - value for name, value in trained(model).items()}


def largest_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Largest difference over the largest value, of the worst tensor."""
    assert found.keys() == truth.keys(), found.keys() ^ truth.keys()
    return max(
        float((found[name] - want).abs().max() / want.abs().max().clamp(min=1e-12))
        for name, want in truth.items()
    )
