"""Started by torchrun from test_rollout_sharded.py: unequal rollouts of a sharded model."""

from __future__ import annotations

import json
import sys

import torch

from crpo_fast import distributed
from crpo_fast import policy as policies
from crpo_fast.batch import SamplingParams
from crpo_fast.models import build_model, export_model, load_model, train_tokenizer
from crpo_fast.rollout.hf import HFEngine
from crpo_fast.rollout.static import StaticEngine

PARAMS = SamplingParams(max_tokens=10, eos_ids=(1,))


def make(tied: bool) -> torch.nn.Module:
    return build_model(
        vocab_size=300,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        tie_word_embeddings=tied,
        eos_token_id=1,
        seed=1,
    )


@torch.no_grad()
def error(dense, groups) -> float:
    """Largest difference of a logprob from the dense model's."""
    worst = 0.0
    for group in groups:
        for sample in group.samples:
            ids = torch.tensor([group.prompt_ids + sample.token_ids])
            rows = dense(ids, use_cache=False).logits[0].log_softmax(-1)
            rows = rows[len(group.prompt_ids) - 1 : -1]
            expected = rows.gather(1, torch.tensor(sample.token_ids)[:, None]).squeeze(1)
            worst = max(worst, (expected - torch.tensor(sample.logprobs)).abs().max().item())
    return worst


def run(world: distributed.World, engine_class: type, tied: bool, folder: str) -> dict:
    dense, model = make(tied), make(tied)
    policy = policies.create(model, world, compute_dtype=torch.float32)
    engine = engine_class(model, gathered=policy.gathered)
    engine.sync(model, 0)
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]][: 3 - 2 * world.rank]  # three and one
    first = error(dense, engine.generate(prompts, 3, PARAMS, seed=world.rank))
    sharded = all(hasattr(p, "full_tensor") for p in model.parameters())
    with torch.no_grad():  # a step
        for p, q in zip(model.parameters(), dense.parameters(), strict=True):
            p.mul_(1.3)
            q.mul_(1.3)
    engine.sync(model, 1)
    second = error(dense, engine.generate(prompts, 3, PARAMS, seed=world.rank))
    state = distributed.model_state(model)
    export = True
    if world.is_main:
        tokenizer = train_tokenizer(["a b"], 300, [])
        export_model(model, tokenizer, folder, state_dict=state)
        loaded = load_model(folder)[0]
        pairs = zip(loaded.parameters(), dense.parameters(), strict=True)
        export = all(torch.equal(a, b) for a, b in pairs)
        export &= loaded.config.architectures == ["LlamaForCausalLM"]
    return {"errors": [first, second], "sharded": sharded, "export": export}


def main(out: str) -> None:
    world = distributed.init()
    results = {
        f"{engine_class.__name__} tied={tied}": run(world, engine_class, tied, f"{out}.model")
        for engine_class in (HFEngine, StaticEngine)
        for tied in (True, False)
    }
    gathered = distributed.all_gather(results, world)
    if world.is_main:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(gathered, file)
    distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
