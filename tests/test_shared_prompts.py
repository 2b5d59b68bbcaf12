"""``train.layout = "shared"``: a prompt once before its completions, with the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crpo_fast import attention, distributed
from crpo_fast.attention import SDPA_PACKED, flash_bounds, segments, sequence_lengths
from crpo_fast.config import Config, ConfigError, TrainConfig
from crpo_fast.distributed import World
from crpo_fast.loss import LossSpec
from crpo_fast.packing import Sequence, pack
from crpo_fast.policy import create, install_head
from crpo_fast.session import check_layout
from crpo_fast.step import accumulate, micro_batches
from crpo_kernels import ObjectiveSpec
from layout_cases import COEFS, VOCAB, make_model

# of each group: tokens of its prompt, then of its completions
GROUPS = [(5, [4, 1, 6, 3]), (1, [2, 5]), (9, [0, 3, 0, 2]), (3, [7]), (2, [1, 1]), (4, [0])]
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 2, 1]])
RUNS = [(0, 5), (3, 3), (0, 3), (2, 1), (1, 1)]


def grouped(groups: list[tuple[int, list[int]]] = GROUPS) -> list[Sequence]:
    generator = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(2, VOCAB, (count,), generator=generator).tolist()

    sequences = []
    for prompt, completions in groups:
        shared = ids(prompt)
        for count in completions:
            stages = sorted(torch.randint(-1, 3, (count,), generator=generator).tolist())
            logprobs = (torch.rand(count, generator=generator) - 2.9).tolist()
            advantage = float(torch.randn((), generator=generator))
            sequences.append(Sequence(shared, ids(count), stages, logprobs, advantage))
    return sequences


def test_by_hand() -> None:
    group = [Sequence([1, 2], ids, [-1] * len(ids)) for ids in ([3, 4, 5], [6], [], [7, 8])]
    (batch,) = pack([*group, replace(group[0], prompt_ids=[9])], 8, layout="shared")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 7, 9, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2]]
    assert batch.attention_mask is None
    assert batch.labels.tolist() == [3, 4, 5, 6, 7, 8, 3, 4, 5]
    assert batch.rows.tolist() == [1, 2, 3, 1, 1, 4, 5, 6, 7]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6, 9]


@pytest.fixture
def alone() -> Iterator[World]:
    yield distributed.init(threads=1)
    distributed.shutdown()


lengths = st.lists(st.integers(0, 6), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), lengths), max_size=5), st.integers(15, 50))
def test_every_token_once_in_its_place(groups: list[tuple[int, list[int]]], budget: int) -> None:
    sequences = grouped(groups)
    whole = [s for s in sequences for _ in s.completion_ids]
    places = [j for s in sequences for j in range(len(s.completion_ids))]
    seen = []
    for batch in pack(sequences, budget, layout="shared"):
        assert batch.input_ids.numel() <= budget
        ids, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
        for row, label, source in zip(batch.rows, batch.labels, batch.source, strict=True):
            sequence, place = whole[source], places[source]
            assert label == sequence.completion_ids[place]
            known = [*sequence.prompt_ids, *sequence.completion_ids[:place]]
            assert (ids[row], positions[row]) == (known[-1], len(known) - 1)
        seen += batch.source.tolist()
    assert sorted(seen) == list(range(len(whole)))


@pytest.mark.parametrize("budget", [16, 200])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_whole_sequences(
    budget: int, checkpointing: bool, alone: World
) -> None:
    spec = LossSpec(
        ObjectiveSpec("clip", clip_low=0.2, clip_high=0.3, rho_mode="truncate", rho_cap=1.5),
        "bnpo",
        COEFS,
        group=3,
    )
    found = {}
    for layout in ("padded", "shared"):
        policy = create(
            make_model(True, torch.float64),
            alone,
            compute_dtype=torch.float64,
            activation_checkpointing=checkpointing,
        )
        batches = micro_batches(grouped(), spec, policy, token_budget=budget, layout=layout)
        loss, sums, _ = accumulate(policy, batches, spec)
        gradients = [p.grad for p in policy.model.parameters()]
        found[layout] = loss, sums.means(), gradients, sum(b.input_ids.numel() for b in batches)
    (loss, metrics, gradients, slots), (other, others, further, fewer) = found.values()
    assert other == pytest.approx(loss, rel=1e-12)
    assert others == pytest.approx(metrics, rel=1e-10)
    for a, b in zip(gradients, further, strict=True):
        assert (a - b).abs().max() <= 1e-11 * b.abs().max()
    assert fewer <= 0.7 * slots


def test_segments_are_found_where_positions_do_not_count_on() -> None:
    assert segments(POSITIONS) == RUNS
    assert segments(torch.tensor([[3, 4, 0]])) == [(3, 2), (0, 1)]
    copy = POSITIONS.clone()
    attention.moved(POSITIONS, copy)
    assert segments(copy) == RUNS


def test_who_knows_whole_sequences_only_refuses() -> None:
    words = r"prompts that several completions share\. Type --train\.layout packed, or --model"
    with pytest.raises(ValueError, match=words):
        sequence_lengths(POSITIONS)
    with pytest.raises(ValueError, match=words):
        flash_bounds("flash_attention_2", POSITIONS)


@pytest.mark.parametrize(
    ("layout", "settings", "words"),
    [
        ("shared", {}, ""),
        ("shared", {"layer_types": ["full_attention"] * 2, "sliding_window": 8}, ""),
        ("shared", {"_attn_implementation": "flash_attention_2"}, "attention is flash_attention_2"),
        ("shared", {"sliding_window": 8}, "layers of sliding_attention"),
        ("shared", {"layer_types": ["linear_attention", "full_attention"]}, "of linear_attention"),
        ("packed", {"sliding_window": 8}, ""),
    ],
)
def test_a_model_that_would_not_see_the_prompt_is_refused(
    layout: str, settings: dict, words: str
) -> None:
    config = Config(train=TrainConfig(layout=layout))
    model = SimpleNamespace(
        config=SimpleNamespace(**{"_attn_implementation": SDPA_PACKED, **settings})
    )
    if not words:
        check_layout(config, model)
        return
    with pytest.raises(ConfigError, match=rf"got 'shared': .*{words}.* --train\.layout packed"):
        check_layout(config, model)


def test_gradients_of_rows_that_repeat_are_the_same_in_every_run() -> None:
    """With two threads: the row before the first completion has a gradient from each of them."""
    prompt, count = [5] * 40, 8
    group = [Sequence(prompt, [6] * 120, [-1] * 120) for _ in range(count)]
    (batch,) = pack(group, 4000, layout="shared")
    torch.manual_seed(0)
    hidden = torch.randn(1, batch.position_ids.shape[1], 128, requires_grad=True)
    head = torch.nn.Linear(128, 3)
    decoder = SimpleNamespace(last_hidden_state=hidden)
    model = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation=SDPA_PACKED),
        base_model=lambda **_: decoder,
        get_output_embeddings=lambda: head,
    )
    install_head(model)
    assert batch.rows.numel() == 8 * 120 > batch.rows.unique().numel()
    upstream = torch.randn(batch.rows.numel(), 128)
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(60):
            rows = model.policy_forward(batch, lambda hidden, *_, **__: hidden, {})
            (gradient,) = torch.autograd.grad(rows, hidden, upstream)
            found.append(gradient)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, found[0]) for other in found)
    assert torch.equal(rows, hidden[0, batch.rows])
    torch.testing.assert_close(
        found[0][0], torch.zeros_like(hidden[0]).index_add_(0, batch.rows, upstream)
    )
