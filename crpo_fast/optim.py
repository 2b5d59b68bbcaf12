"""AdamW and the learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from crpo_fast.config import OptimConfig, PhaseConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay only on those of two dimensions."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True
    )


def learning_rate(step: int, phase: PhaseConfig, config: OptimConfig) -> float:
    """Learning rate of the 0-based ``step`` of a phase.

    Linear warm-up over ``warmup_steps``, then constant, or linear or cosine decay to 0 at the
    phase's end. A pure function of the step, so that a resumed run needs no scheduler state.
    """
    peak = config.lr if phase.lr is None else phase.lr
    warmup = config.warmup_steps if phase.warmup_steps is None else phase.warmup_steps
    schedule = phase.schedule or config.schedule
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, phase.steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[schedule]
    return peak * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set ``lr`` in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
