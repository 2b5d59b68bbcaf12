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
from layout_worker import COEFS, make_model, make_sequences


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


def test_rank_without_a_sequence() -> None:
    spec = LossSpec(ObjectiveSpec.preset("crpo"), "sequence_mean", (-0.1, 0.3))
    flat = flat_vectors([], spec, all_sum=lambda x: x + 3, rank=1, world_size=2)
    assert all(v is not None and v.numel() == 0 for v in flat.values())
