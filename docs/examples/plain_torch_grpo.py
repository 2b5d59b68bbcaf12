"""GRPO in plain torch with the fused loss: rewards alone teach a small decoder to repeat a token.

Run it: python docs/examples/plain_torch_grpo.py
"""

from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from crpo_fast.integrations.causal_lm import add_fused_head
from crpo_kernels import IGNORE_INDEX, ObjectiveSpec, aggregation_weights, linear_policy_loss

STEPS, UPDATES, PROMPTS, GROUP, LENGTH, VOCAB = 40, 2, 8, 8, 6, 12
CONFIG = LlamaConfig(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip


def sample(model: LlamaForCausalLM) -> torch.Tensor:
    """PROMPTS x GROUP sequences: a prompt of one token and LENGTH sampled ones."""
    prompts = torch.randint(1, VOCAB, (PROMPTS, 1)).repeat_interleave(GROUP, dim=0)
    mask = torch.ones_like(prompts)
    return model.generate(
        prompts, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=LENGTH
    )


def main() -> None:
    """Sample, reward, update twice; prints a line a step."""
    torch.manual_seed(0)
    model = add_fused_head(LlamaForCausalLM(CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        ids = sample(model)  # [B, L]
        rewards = (ids[:, 1:] == ids[:, :1]).float().mean(1).view(PROMPTS, GROUP)
        spread = rewards.std(1, keepdim=True) + 1e-4
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / spread).view(-1, 1).expand_as(ids)
        labels = ids.roll(-1, 1)  # of each place the next token
        labels[:, -1] = IGNORE_INDEX
        bounds = torch.arange(0, ids.numel() + 1, ids.shape[1])  # where sequences begin and end
        weights = aggregation_weights(labels != IGNORE_INDEX, bounds, aggregation="sequence_mean")
        old = None  # the first update is on-policy
        for _ in range(UPDATES):
            loss_of = partial(
                linear_policy_loss, labels=labels, advantages=advantages, token_weights=weights,
                old_logprobs=old, spec=ObjectiveSpec.preset("grpo"),
            )  # fmt: skip
            loss, stats = model(ids, head=loss_of)  # no logits are made
            old = stats.logprobs if old is None else old
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"step {step} reward {rewards.mean():.3f}")


if __name__ == "__main__":
    main()
