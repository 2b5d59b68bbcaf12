"""Started by torchrun from test_integration_trl.py: two ranks train with both trainers.

Arguments: the model's folder and one to write into. ranks.json says how far losses, gradients and
logs of both trainers are apart, rank<n>.pt what stage entropy does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from trl import GRPOTrainer

import trl_cases
from crpo_fast.integrations.trl import CRPOTrainer, EntropyConfig, StageConfig

CASES = (
    {"loss_type": "dapo", "steps_per_generation": 4, "beta": 0.1, "use_bias_correction_kl": False},
    {"loss_type": "bnpo"},
)


def main() -> None:
    model, folder = map(Path, sys.argv[1:])
    report = []
    for options in CASES:
        plain = {"trainer_options": {"entropy": EntropyConfig(magnitude=0.0)}}
        ours = trl_cases.train(CRPOTrainer, model, folder / "ours", **plain, **options)
        theirs = trl_cases.train(GRPOTrainer, model, folder / "theirs", **options)
        report.append(trl_cases.differences(ours, theirs))
    stages = tuple(StageConfig(name) for name in trl_cases.STAGES)
    entropy = {"stages": stages, "entropy": EntropyConfig(magnitude=2.0, tau=1.5)}
    runs = [
        trl_cases.train(
            CRPOTrainer, model, folder / "stages", trainer_options=chosen, **trl_cases.STAGED
        )
        for chosen in (entropy, plain["trainer_options"])
    ]
    accelerator = runs[0].trainer.accelerator
    found = {
        "inputs": runs[0].inputs[:2],
        "staged": runs[0].gradients[0],
        "plain": runs[1].gradients[0],
        "log": runs[0].logs[0],
        "coefs": runs[0].trainer.grammar.coefs(),
    }
    torch.save(found, folder / f"rank{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        (folder / "ranks.json").write_text(json.dumps(report))
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
