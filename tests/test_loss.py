"""Weight vectors by hand, and the entropy term: gone at M = 0 to the bit, there otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crpo_fast.config import Config, EntropyConfig, ObjectiveConfig, PhaseConfig
from crpo_fast.loss import LossSpec, flat_vectors, loss_spec, micro_batch_loss
from crpo_fast.packing import MicroBatch, Sequence, pack
from crpo_fast.policy import install_head
from crpo_kernels import ObjectiveSpec
from layout_cases import COEFS, make_model, make_sequences


def same(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def gradients(spec: LossSpec, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Gradients of one packed micro-batch; ``changes`` replace flat vectors."""
    model = make_model(True, torch.float32)
    install_head(model)
    sequences = make_sequences()
    flat = {**flat_vectors(sequences, spec, all_sum=same), **changes}

    def policy(batch: MicroBatch, compute: object) -> object:
        return model.policy_forward(batch, compute, {})

    for batch in pack(sequences, 1000):
        loss, _ = micro_batch_loss(policy, batch.attach(**flat), spec)
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


SPEC = LossSpec(ObjectiveSpec.preset("crpo", kl_coef=0.0), "bnpo", COEFS, group=4, temperature=0.85)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant", "bnpo"])
def test_zero_magnitude_is_bitwise_the_objective_without_the_term(aggregation: str) -> None:
    without = replace(SPEC, aggregation=aggregation, stage_coefs=(0.0,) * 3, max_length=24)
    assert not without.has_entropy
    zeros = torch.zeros(sum(len(s.completion_ids) for s in make_sequences()))
    plain, zeroed = gradients(without), gradients(without, entropy_weights=zeros)
    assert all(torch.equal(plain[k], zeroed[k]) for k in plain)
    with_term = gradients(replace(SPEC, aggregation=aggregation, max_length=24))
    assert any(not torch.equal(plain[k], with_term[k]) for k in plain)


def test_magnitude_zero_in_the_config_has_no_term() -> None:
    config = Config(entropy=EntropyConfig(magnitude=0.0))
    assert not loss_spec(config, PhaseConfig("crpo"), [0.0] * 5).has_entropy
    assert loss_spec(config, PhaseConfig("crpo"), [0.1] * 5).has_entropy
    assert not loss_spec(config, PhaseConfig("grpo"), [0.1] * 5).has_entropy


def test_defaults_are_the_papers() -> None:
    spec = loss_spec(Config(), PhaseConfig("crpo"), [0.1])
    objective = spec.objective
    assert (objective.clip_low, objective.clip_high, objective.kl_coef) == (0.2, 0.2, 0.01)
    assert (objective.kl_estimator, spec.aggregation, spec.group) == ("k3", "bnpo", 4)
    assert (spec.reduction, spec.reference_length) == ("sequence_mean", None)
    changed = loss_spec(Config(objective=ObjectiveConfig(kl_coef=0.5)), PhaseConfig("crpo"), [])
    assert changed.objective.kl_coef == 0.5


def two() -> list[Sequence]:
    return [
        Sequence([1], [2, 3, 4], [0, 0, -1], [-1.0] * 3, advantage=2.0),
        Sequence([1], [5], [1], [-2.0], advantage=-1.0),
    ]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        ("sequence_mean", [1 / 6, 1 / 6, 1 / 6, 1 / 2]),
        ("constant", [1 / 20] * 4),
        ("bnpo", [1 / 6, 1 / 6, 1 / 6, 1 / 2]),
    ],
)
def test_token_weights_by_hand(aggregation: str, expected: list[float]) -> None:
    spec = LossSpec(ObjectiveSpec.preset("grpo"), aggregation, (), max_length=10, group=1)
    flat = flat_vectors(two(), spec, all_sum=same)
    assert flat["token_weights"].tolist() == pytest.approx(expected)
    assert flat["advantages"].tolist() == [2.0, 2.0, 2.0, -1.0]
    assert flat["entropy_weights"] is None


@pytest.mark.parametrize(
    ("reduction", "reference", "expected"),
    [
        ("sequence_mean", None, [-0.1 / 4, -0.1 / 4, 0, 0.3 / 2]),
        ("present_only", None, [-0.1 / 2, -0.1 / 2, 0, 0.3]),
        ("token_mean", None, [-0.1 / 2, -0.1 / 2, 0, 0.3]),
        ("sequence_mean", 8, [-0.1 / 4 * 2 / 8, -0.1 / 4 * 2 / 8, 0, 0.3 / 2 / 8]),
    ],
)
def test_entropy_weights_by_hand(
    reduction: str, reference: int | None, expected: list[float]
) -> None:
    spec = LossSpec(
        ObjectiveSpec.preset("crpo"),
        "token_mean",
        (-0.1, 0.3),
        reduction=reduction,
        reference_length=reference,
    )
    flat = flat_vectors(two(), spec, all_sum=same)
    assert flat["entropy_weights"].tolist() == pytest.approx(expected)


def test_weights_carry_the_ranks_and_the_global_counts() -> None:
    """Two ranks with the same two sequences each: half the weight per token, times two ranks."""
    spec = LossSpec(ObjectiveSpec.preset("crpo"), "token_mean", (-0.1, 0.3))
    one = flat_vectors(two(), spec, all_sum=same)
    both = flat_vectors(two(), spec, all_sum=lambda x: 2 * x, rank=1, world_size=2)
    for name in ("token_weights", "entropy_weights"):
        assert torch.allclose(one[name], both[name], rtol=1e-7)


def many(lengths: list[int]) -> list[Sequence]:
    return [Sequence([1], [2] * n, [0] * n, [-1.0] * n) for n in lengths]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 6] * 6),
        ("sequence_mean", [1 / 20] * 4 + [1 / 5, 1 / 5]),  # an empty one counts
        ("constant", [1 / 50] * 6),
        # groups of 2: [0, 4], [0, 0], [1, 1] hold 4, 0 and 2 tokens; the empty one counts
        ("bnpo", [1 / 12] * 4 + [1 / 6] * 2),
    ],
)
def test_empty_completions_count_as_sequences(aggregation: str, expected: list[float]) -> None:
    spec = LossSpec(ObjectiveSpec.preset("crpo"), aggregation, (0.3,), max_length=10, group=2)
    lengths = [0, 4, 0, 0, 1, 1] if aggregation == "bnpo" else [0, 4, 0, 1, 1]
    flat = flat_vectors(many(lengths), spec, all_sum=same)
    assert flat["token_weights"].tolist() == pytest.approx(expected)
    shares = [0.3 / len(lengths) / n for n in (4, 4, 4, 4, 1, 1)]
    assert flat["entropy_weights"].tolist() == pytest.approx(shares)
    assert flat["rollout_logprobs"].numel() == flat["advantages"].numel() == 6


def test_bnpo_groups_do_not_depend_on_how_many_sequences_a_rank_holds() -> None:
    """Groups of 3 over ranks that hold 4, 0, 1 and 2 sequences: 0 1 2 | 3 4 5 | 6."""
    spec = LossSpec(ObjectiveSpec.preset("grpo"), "bnpo", (), group=3)
    lengths, held = [2, 0, 3, 1, 4, 1, 2], [4, 0, 1, 2]
    whole = flat_vectors(many(lengths), spec, all_sum=same)["token_weights"]
    assert whole.tolist() == pytest.approx([1 / 15] * 5 + [1 / 18] * 6 + [1 / 6] * 2)
    parts = []
    for rank in range(4):
        mine = lengths[sum(held[:rank]) : sum(held[: rank + 1])]
        answers = [torch.tensor(held), torch.tensor([13, 7, 0, 5, 6, 2])]  # tokens, sequences, ...
        flat = flat_vectors(
            many(mine),
            spec,
            all_sum=lambda x, answers=answers: answers.pop(0).to(x),
            rank=rank,
            world_size=4,
        )
        parts.append(flat["token_weights"] / 4)
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-6)


def test_logprobs_that_one_rank_lacks_are_used_on_none() -> None:
    spec = LossSpec(ObjectiveSpec.preset("grpo"), "token_mean", ())
    assert flat_vectors(many([2]), spec, all_sum=same)["rollout_logprobs"].tolist() == [-1.0] * 2
    lacking = flat_vectors(many([2]), spec, all_sum=lambda x: x + 1)  # another rank has one without
    assert lacking["rollout_logprobs"] is None
    empty = [*many([2]), Sequence([1], [], [])]
    assert flat_vectors(empty, spec, all_sum=same)["rollout_logprobs"] is not None


def test_rank_without_a_sequence() -> None:
    spec = LossSpec(ObjectiveSpec.preset("crpo"), "sequence_mean", (-0.1, 0.3))
    flat = flat_vectors([], spec, all_sum=lambda x: 3 * x, rank=1, world_size=2)
    assert all(v is not None and v.numel() == 0 for v in flat.values())
