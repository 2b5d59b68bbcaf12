"""A head that torch's tensor parallelism spreads over ranks, under the fused loss.

    torchrun --standalone --nproc_per_node 2 docs/examples/tensor_parallel_head.py

The MLP and the head are split by `parallelize_module`: ``ColwiseParallel`` gives every rank some
rows of the head's weight (some outputs). The loss takes them as they are: no rank sees the others'
rows, and no logits are gathered. Every rank gets the loss of the whole vocabulary and the whole
gradient of the hidden states; what it gets of the head's gradient are its own rows.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from crpo_kernels import ObjectiveSpec, aggregation_weights, linear_policy_loss

VOCAB, DIM, TOKENS = 101, 16, 24  # 101 rows are 51 and 50 on two ranks, 34, 34, 33 on three
INNER = 96  # RowwiseParallel wants equal parts, the head does not


class Model(nn.Module):
    """A stand-in for a decoder: the hidden states of some tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.up, self.down = nn.Linear(DIM, INNER), nn.Linear(INNER, DIM)
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # [T] -> [T, D]
        """The states before lm_head."""
        x = self.embedding(ids)
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def shard_of(weight: Tensor, mesh: DeviceMesh) -> dict[str, Any]:
    """What the loss must be told of a head that ColwiseParallel has split."""
    rows = -(-weight.shape[0] // mesh.size())  # of every shard but the last ones: as torch.chunk
    start = min(mesh.get_local_rank() * rows, weight.shape[0])
    return {"process_group": mesh.get_group(), "vocab_start": start}


def loss_of(model: Model, ids: Tensor, labels: Tensor, **shard: Any) -> Tensor:
    """The GRPO loss; on-policy, one sequence."""
    weight = model.lm_head.weight
    if isinstance(weight, DTensor):
        weight = weight.to_local()  # [V of this rank, D]; its gradient comes back as a DTensor
    cu_seqlens = torch.tensor([0, ids.numel()])
    loss, _ = linear_policy_loss(
        model(ids), weight, labels, advantages=torch.linspace(-1, 1, ids.numel()),
        token_weights=aggregation_weights(labels != -100, cu_seqlens),
        entropy_weights=torch.full((ids.numel(),), 1e-3),
        spec=ObjectiveSpec.preset("grpo"), **shard,
    )  # fmt: skip
    return loss


def main() -> None:
    """Loss and gradients beside those of the whole model in one process."""
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("tp",))
    torch.manual_seed(0)  # the same model and the same batch on every rank
    whole = Model()
    model = copy.deepcopy(whole)
    plan: dict[str, ParallelStyle] = {
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
        "lm_head": ColwiseParallel(),
    }
    parallelize_module(model, mesh["tp"], plan)
    ids, labels = torch.randint(0, VOCAB, (2, TOKENS))
    labels[:8] = -100  # the prompt

    loss = loss_of(model, ids, labels, **shard_of(model.lm_head.weight, mesh["tp"]))
    loss.backward()

    expected = loss_of(whole, ids, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (name, mine), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        gradient = mine.grad.full_tensor() if isinstance(mine.grad, DTensor) else mine.grad
        torch.testing.assert_close(gradient, theirs.grad, msg=f"gradient of {name}")
    head = model.lm_head.weight
    rows = head.to_local().shape[0] if isinstance(head, DTensor) else VOCAB
    print(
        f"rank {dist.get_rank()}: {rows} of {VOCAB} rows of the head, loss {loss.item():.6f}; "
        "loss and all gradients equal the whole head's",
        flush=True,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
