"""A tiny language model, its data and its dense fp64 gradients, for the loss under every wrapper.

The data are pieces, one micro-batch each. Piece i belongs to rank i modulo the number of ranks:
one rank accumulates all of them, two ranks half of them each, so that every layout has the same
gradient. Weights of tokens are global; only the number of ranks comes on top, because FSDP2 and DDP
average gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crpo_kernels import IGNORE_INDEX, ObjectiveSpec, linear_logprobs, linear_policy_loss

VOCAB, DIM = 131, 16  # the vocabulary is off every block size and number of ranks
BLOCK_V = 32  # of the kernels in these tests: five blocks, the last one narrow
LENGTHS = (9, 7, 12, 6)  # tokens of the pieces
SMALL = 6_000  # bytes of workspace: several chunks in several groups, nothing is kept
SPEC = ObjectiveSpec.preset("crpo", kl_coef=0.05, rho_mode="truncate")
TEMPERATURE = 0.9


@dataclass(frozen=True)
class Case:
    """One way to run the model.

    Attributes:
        name: of the case.
        wrapper: plain, ddp or fsdp.
        tied: the head is the embedding, in FSDP2's root unit.
        mode: of the loss; "logprobs" is a loss in torch on `linear_logprobs`.
        workspace: bytes of the loss; None: everything in one chunk.
        frozen: the head has no gradient.
        checkpointing: what is computed again in backward: blocks, loss.
        autocast: bf16 with fp32 weights.
        bf16: FSDP2 with fp32 weights and bf16 compute.
        reshard: FSDP2 drops the head's whole weight between forward and backward.
        empty: how the odd pieces count: whole, "ignored" (every label is -100) or "no_rows".
        syncs: gradients are reduced once, with the last micro-batch.
    """

    name: str
    wrapper: str = "fsdp"
    tied: bool = False
    mode: str = "one_pass"
    workspace: int | None = None
    frozen: bool = False
    checkpointing: tuple[str, ...] = ()
    autocast: bool = False
    bf16: bool = False
    reshard: bool = False
    empty: str = ""
    syncs: bool = True


CASES = (
    Case("ddp", "ddp"),
    Case("ddp_tied_two_pass", "ddp", tied=True, mode="two_pass", workspace=SMALL),
    Case("ddp_checkpointed", "ddp", tied=True, checkpointing=("blocks", "loss")),
    Case("ddp_autocast", "ddp", autocast=True),
    Case("ddp_a_rank_without_rows", "ddp", empty="no_rows"),
    Case("ddp_frozen_head", "ddp", frozen=True, mode="two_pass"),
    Case("fsdp"),
    Case("fsdp_small", workspace=SMALL, reshard=True),
    Case("fsdp_tied", tied=True, workspace=SMALL, checkpointing=("blocks",)),
    Case("fsdp_tied_resharded", tied=True, reshard=True),
    Case("fsdp_two_pass_kept", mode="two_pass", reshard=True),
    Case("fsdp_recomputed", mode="two_pass", workspace=SMALL, reshard=True),
    Case("fsdp_recomputed_tied", tied=True, mode="two_pass", workspace=SMALL, reshard=True),
    Case("fsdp_recomputed_every_sync", mode="two_pass", workspace=SMALL, reshard=True, syncs=False),
    Case("fsdp_own_loss", mode="logprobs", workspace=SMALL, reshard=True),
    Case("fsdp_frozen", frozen=True, mode="two_pass", workspace=SMALL, reshard=True),
    Case("fsdp_frozen_one_pass", frozen=True),
    Case("fsdp_checkpointed_loss", checkpointing=("blocks", "loss"), reshard=True),
    Case("fsdp_checkpointed_two_pass", mode="two_pass", checkpointing=("loss",), reshard=True),
    Case("fsdp_autocast", autocast=True, mode="two_pass", workspace=SMALL, reshard=True),
    Case("fsdp_bf16", bf16=True),
    Case("fsdp_bf16_tied", bf16=True, tied=True, mode="two_pass", workspace=SMALL, reshard=True),
    Case("fsdp_ignored_rank", empty="ignored", mode="two_pass", workspace=SMALL, reshard=True),
    Case("fsdp_empty_rank", empty="no_rows"),
    Case("fsdp_empty_rank_tied", empty="no_rows", tied=True, mode="two_pass", reshard=True),
)
TRAINER_CASES = {1: (4, 19), 2: (1, 3, 4, 14, 19), 4: ()}  # of layout_cases.covering_set
FOUR_RANKS = ("ddp", "fsdp_recomputed_tied", "fsdp_tied", "fsdp_empty_rank")
ONE_RANK = ("ddp_autocast", "fsdp_small", "fsdp_recomputed_tied", "fsdp_own_loss", "fsdp_bf16")


def cases_of(ranks: int) -> list[Case]:
    """All of them on two ranks, some on one and on four."""
    names = {1: ONE_RANK, 4: FOUR_RANKS}.get(ranks)
    return [case for case in CASES if names is None or case.name in names]


@dataclass(frozen=True)
class Piece:
    """One micro-batch; every vector is fp64 and whole sequences long."""

    ids: Tensor  # [L] int64
    labels: Tensor  # [R] int64, of the last R positions
    vectors: dict[str, Tensor]  # [R] each

    @property
    def num_rows(self) -> int:
        """R."""
        return self.labels.numel()


def make_pieces(case: Case) -> list[Piece]:
    """The data of all ranks."""
    generator = torch.Generator().manual_seed(7)

    def rand(count: int, scale: float, shift: float = 0.0) -> Tensor:
        return shift + scale * torch.randn(count, generator=generator, dtype=torch.float64)

    pieces, total = [], sum(LENGTHS)
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(0, VOCAB, (length,), generator=generator)
        labels = torch.randint(0, VOCAB, (length,), generator=generator)
        labels[::4] = IGNORE_INDEX
        vectors = {
            "advantages": rand(length, 1.0),
            "token_weights": rand(length, 1.0).abs() / total,
            "entropy_weights": rand(length, 0.3) / total,
            "z_loss_weights": rand(length, 0.01).abs() / total,
            "old_logprobs": rand(length, 0.3, -4.9),
            "rollout_logprobs": rand(length, 0.3, -4.9),
            "ref_logprobs": rand(length, 0.4, -4.9),
        }
        if i % 2 and case.empty:
            rows = 0 if case.empty == "no_rows" else length
            labels = torch.full((rows,), IGNORE_INDEX)
            vectors = {name: v[:rows] for name, v in vectors.items()}
        pieces.append(Piece(ids, labels, vectors))
    return pieces


class Block(nn.Module):
    """Mixes neighbours, so that rows depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2 * DIM, 24), nn.Linear(24, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [L, D]
        """A residual layer."""
        return x + self.down(torch.tanh(self.up(torch.cat([x, x.roll(1, 0)], 1))))


class Head(nn.Linear):
    """A projection whose forward is the loss, so that FSDP2's hooks surround it."""

    def forward(self, hidden: Tensor, compute) -> Tensor:
        """``compute`` with the whole weight."""
        return compute(hidden, self.weight, self.bias)


class Net(nn.Module):
    """Embedding, two blocks, norm, head; the weights are the same numbers in every dtype."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.case = case
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(DIM)
        self.head = Head(DIM, VOCAB, bias=not case.tied)
        with torch.no_grad():
            for name, p in self.named_parameters():
                spread = 0.5 if name.startswith(("embedding", "head")) else 0.3
                p.copy_(spread * torch.randn(p.shape, generator=generator))
            self.norm.weight += 1
        if case.tied:
            self.head.weight = self.embedding.weight
        if case.frozen:
            self.head.requires_grad_(False)

    def forward(self, ids: Tensor, num_rows: int, compute) -> Tensor:
        """``compute(hidden [R, D], weight, bias)`` on the last R positions."""
        x = self.embedding(ids)
        for block in self.blocks:
            if "blocks" in self.case.checkpointing:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        hidden = self.norm(x)[len(ids) - num_rows :]
        return self.head(hidden, compute)


def loss_of(piece: Piece, case: Case, backend: str, dtype: torch.dtype, scale: float = 1.0):
    """The head's function: the loss of a piece, times ``scale``."""
    options = {"backend": backend, "temperature": TEMPERATURE}
    if backend != "dense":
        mode = "auto" if case.mode == "logprobs" else case.mode
        options |= {"mode": mode, "workspace_bytes": case.workspace}
    vectors = {name: v.to(dtype) for name, v in piece.vectors.items()}

    def policy_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if case.mode == "logprobs":
            out = linear_logprobs(hidden, weight, piece.labels, bias=bias, **options)
            terms = vectors["token_weights"] * out.logprobs * vectors["advantages"]
            terms = terms + vectors["entropy_weights"] * out.entropy
            return scale * (terms + vectors["z_loss_weights"] * out.lse.square()).sum()
        return (
            scale
            * linear_policy_loss(
                hidden, weight, piece.labels, bias=bias, spec=SPEC, **vectors, **options
            )[0]
        )

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if "loss" in case.checkpointing:
            return checkpoint(policy_loss, hidden, weight, bias, use_reentrant=False)
        return policy_loss(hidden, weight, bias)

    return compute


def gradients_of(
    case: Case, backend: str, dtype: torch.dtype, compute_dtype: torch.dtype | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of all pieces in this process, nothing sharded and nothing wrapped.

    Args:
        case: what is computed; ``autocast`` is followed, FSDP2's bf16 not.
        backend: of the loss.
        dtype: of the weights.
        compute_dtype: of a copy of the weights in which everything is computed, as FSDP2 does.
    """
    masters = Net(case).to(dtype)
    net = masters if compute_dtype is None else Net(case).to(compute_dtype)
    total = 0.0
    for piece in make_pieces(case):
        stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            compute = loss_of(piece, case, backend, stats_dtype)
            loss = net(piece.ids, piece.num_rows, compute)
        loss.backward()
        total += float(loss.detach())
        for name, p in net.named_parameters() if net is not masters else ():
            if p.grad is not None:
                master = masters.get_parameter(name)
                wide = p.grad.to(dtype)
                master.grad = wide if master.grad is None else master.grad + wide
                p.grad = None
    return total, {n: p.grad for n, p in masters.named_parameters() if p.grad is not None}
