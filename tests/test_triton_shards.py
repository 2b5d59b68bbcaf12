"""The row kernels on shards of a vocabulary: what a vocabulary-parallel head asks of them.

Each shard has its own logits and the labels as it sees them, -1 where another shard has them. The
shards' (maximum, sum, weighted sum, label's logit) are joined in torch, as one all-gather would
allow, and every shard makes its columns of the gradient from the joined statistics.
"""

from __future__ import annotations

import pytest
import torch

import triton_tools

if reason := triton_tools.why_no_triton():
    pytest.skip(reason, allow_module_level=True)

import itertools

from crpo_kernels import rows_triton
from crpo_kernels.row_table import OUTPUTS, SUMS, RowTable
from crpo_kernels.rows import LogitView, RowStats
from crpo_kernels.terms import Coefficients

NUM_ROWS, VOCAB = 11, 203


def shard_stats(raw, labels):
    table = RowTable((*SUMS, *OUTPUTS), raw.shape[0], raw, torch.float32)
    rows_triton.row_stats(raw, labels, LogitView.make(None, 0.8, 1.0, None), table, slice(None))
    return table.stats()


def joined(parts: list[RowStats]) -> RowStats:
    """Statistics of the whole vocabulary from those of its shards."""
    top = torch.stack([part.maximum for part in parts]).amax(0)  # [C]
    s, t = torch.zeros_like(top), torch.zeros_like(top)
    for part in parts:
        d = part.maximum - top
        own = part.log_sum.exp()
        s = s + d.exp() * own
        t = t + d.exp() * own * (part.mean_shift + d)
    label_logit = torch.stack([p.logprobs + p.log_sum + p.maximum for p in parts]).amax(0)
    return RowStats(label_logit - top - s.log(), top, s.log(), t / s, label_logit >= top)


@pytest.mark.parametrize("bounds", [(0, 64, 203), (0, 100, 101, 203)])
def test_unequal_shards_equal_the_whole(bounds, device, monkeypatch):
    monkeypatch.setattr(rows_triton, "BLOCK_V", 64)
    g = torch.Generator().manual_seed(5)
    raw = (3 * torch.randn(NUM_ROWS, VOCAB, generator=g)).to(device)
    labels = torch.randint(0, VOCAB, (NUM_ROWS,), generator=g).to(device)
    labels[0], labels[1] = bounds[1], bounds[1] - 1  # on both sides of a border
    weights = torch.randn(3, NUM_ROWS, generator=g).to(device)

    z = (raw.double() / 0.8).requires_grad_()
    log_p = z.log_softmax(1)
    logprobs = log_p.gather(1, labels[:, None])[:, 0]
    entropy, lse = -(log_p.exp() * log_p).sum(1), z.logsumexp(1)
    (weights.double() * torch.stack((logprobs, entropy, lse))).sum().backward()
    assert z.grad is not None

    columns = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    seen = [
        torch.where((labels >= c.start) & (labels < c.stop), labels - c.start, -1) for c in columns
    ]
    pieces = [raw[:, c].contiguous() for c in columns]
    stats = joined([shard_stats(p, own) for p, own in zip(pieces, seen, strict=True)])
    torch.testing.assert_close(stats.logprobs.double(), logprobs.detach(), atol=3e-6, rtol=0)
    torch.testing.assert_close(stats.entropy.double(), entropy.detach(), atol=3e-6, rtol=0)
    torch.testing.assert_close(stats.lse.double(), lse.detach(), atol=3e-6, rtol=0)
    view = LogitView.make(None, 0.8, 1.0, None)
    for piece, own, c in zip(pieces, seen, columns, strict=True):
        d_raw = torch.full_like(piece, float("nan"))
        rows_triton.row_grad(piece, d_raw, own, view, stats, Coefficients(*weights))
        torch.testing.assert_close(d_raw.double(), z.grad[:, c] / 0.8, atol=3e-6, rtol=0)


def test_a_label_of_no_shard_at_all_is_not_a_number(device):
    raw = torch.randn(4, 20, device=device)
    labels = torch.tensor([3, 20, -2, -1], device=device)
    logprobs = shard_stats(raw, labels).logprobs
    assert logprobs[0].isfinite()
    assert logprobs[1:3].isnan().all()
    assert logprobs[3] < -1e29
