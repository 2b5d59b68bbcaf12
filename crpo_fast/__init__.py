"""Train language models with CRPO and the GRPO family, fast."""
