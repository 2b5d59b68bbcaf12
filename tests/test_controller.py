"""Stage-entropy controllers: dual ascent on a simulated plant, annealing, and inside a run."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from crpo_fast import train
from crpo_fast.config import (
    Config,
    ConfigError,
    EntropyConfig,
    PhaseConfig,
    check,
    load_config,
    parse_arguments,
)
from crpo_fast.controller import Anneal, DualAscent, DualOptions, StageController, build
from crpo_fast.stages import StageGrammar
from crpo_fast.task import build_grammar

TINY = str(Path(__file__).with_name("tiny.toml"))
GRAMMAR = StageGrammar.preset("mental_r1")
NAMES = GRAMMAR.names


def ascent(schedule=(-0.06, 0.0), **options) -> DualAscent:
    names = [f"s{k}" for k in range(len(schedule))]
    return DualAscent(names, schedule, DualOptions(**{"bound": 0.06} | options))


# ---- the law


def test_hand_computed_steps():
    """multiplier += integral * gap, beta = bound * (multiplier + proportional * gap)."""
    dual = ascent((-0.03, 0.0), targets=(0.5, 0.5), proportional=0.5, integral=0.1)
    assert dual.coefs == (-0.03, 0.0)
    metrics = dual.update([0.5 * math.e, 0.5])  # gaps 1 and 0
    assert metrics == pytest.approx(
        {"stage_target/0": 0.5, "stage_gap/0": 1.0, "stage_target/1": 0.5, "stage_gap/1": 0.0}
    )
    assert dual.coefs == pytest.approx((0.06 * (-0.5 + 0.1 + 0.5), 0.0))
    dual.update([0.5 / math.e, 0.5])  # gap -1: the multiplier is back at -.5
    assert dual.coefs == pytest.approx((0.06 * -1.0, 0.0))
    dual.update([0.5, 0.5 * math.exp(0.2)])
    assert dual.coefs == pytest.approx((0.06 * -0.5, 0.06 * (0.02 + 0.1)))


def test_entropy_above_its_target_raises_beta_and_below_lowers_it():
    dual = ascent((0.0, 0.0), targets=(0.1, 0.1))
    dual.update([0.12, 0.08])
    assert dual.coefs[0] > 0 > dual.coefs[1]


def test_the_gap_is_a_ratio():
    """The same relative error moves a stage of .05 nats and one of 5 nats alike."""
    dual = ascent((0.0, 0.0), targets=(0.05, 5.0))
    for ratio in (1.2, 0.9, 1.1):
        dual.update([0.05 * ratio, 5.0 * ratio])
    assert dual.coefs[0] == pytest.approx(dual.coefs[1], rel=1e-12)


def test_targets_from_the_first_step_with_fractions_and_floor():
    dual = ascent((0.0,) * 3, fractions=(1.5, 1.0, 0.5), floor=0.02)
    assert dual.targets() == (None, None, None)
    dual.update([0.4, None, 0.03])
    assert dual.targets() == (pytest.approx(0.6), None, 0.02)
    dual.update([0.9, 0.2, 0.9])  # the third's target stays, the second begins
    assert dual.targets() == (pytest.approx(0.6), pytest.approx(0.2), 0.02)
    assert dual.targets(0.5) == (pytest.approx(0.3), pytest.approx(0.1), 0.02)
    one = ascent((0.0, 0.0), fractions=(0.5,))
    one.update([0.4, 0.8])
    assert one.targets() == pytest.approx((0.2, 0.4))


def test_first_coefficients_are_the_schedules():
    """With fraction 1 the first step has no gap: the second step still has the schedule's."""
    dual = ascent((-0.05, 0.02))
    assert dual.coefs == (-0.05, 0.02)
    dual.update([0.3, 0.7])
    assert dual.coefs == pytest.approx((-0.05, 0.02), rel=1e-12)


@pytest.mark.parametrize("absent", [None, math.nan, math.inf])
def test_absent_stage_is_left_as_it_is(absent):
    dual, other = (ascent((-0.05, 0.02), targets=(0.2, 0.2)) for _ in range(2))
    dual.update([0.3, 0.3])
    other.update([0.3, 0.3])
    before = dual.coefs
    metrics = dual.update([absent, 0.1])
    assert set(metrics) == {"stage_target/1", "stage_gap/1"}
    assert dual.coefs[0] == before[0]
    assert dual.coefs[1] != before[1]
    dual.update([0.25, 0.4])
    other.update([0.25, 0.4])
    assert dual.coefs[0] == other.coefs[0]  # as if the step had not been


def test_a_deterministic_stage_is_pushed_to_explore():
    dual = ascent((0.06,), targets=(0.2,))
    dual.update([0.0])
    assert dual.coefs[0] == pytest.approx(-0.06)
    assert all(map(math.isfinite, dual.update([0.0]).values()))


def test_no_windup_at_the_bound():
    """After a thousand steps at the bound beta leaves it as soon as the gap turns."""
    dual = ascent((0.0,), targets=(0.2,))
    for _ in range(1000):
        dual.update([2.0])
        assert dual.coefs[0] <= 0.06
    assert dual.coefs[0] == 0.06
    dual.update([0.2 * 0.8])
    assert dual.coefs[0] < 0.0
    for _ in range(1000):
        dual.update([0.001])
    assert dual.coefs[0] == -0.06
    dual.update([0.2 * 1.25])
    assert dual.coefs[0] > 0.0


# ---- a simulated plant


def simulate(
    gain: float, *, proportional: float = 4.0, integral: float = 0.2, seed: int = 0
) -> list[float]:
    """log(H / target) over 1500 steps of a plant whose entropy answers late to beta.

    An optimizer's momentum (.9) of the pressure moves log H by ``gain`` a step at the bound,
    something else pushes it up with .3 of that, and it is measured with 10 % noise. It starts at
    three times its target under the full bonus.
    """
    dual = ascent((-0.059,), targets=(0.3,), proportional=proportional, integral=integral)
    rng, momentum, log_ratio, seen = random.Random(seed), 0.0, math.log(3.0), []
    for _ in range(1500):
        share = dual.coefs[0] / 0.06
        assert abs(share) <= 1
        momentum = 0.9 * momentum + 0.1 * share
        log_ratio = min(log_ratio - gain * momentum + 0.3 * gain, math.log(20.0))
        dual.update([0.3 * math.exp(log_ratio + rng.gauss(0.0, 0.1))])
        seen.append(log_ratio)
    return seen


@pytest.mark.parametrize("gain", [0.003, 0.01, 0.03, 0.1, 0.3])
def test_plants_two_orders_of_magnitude_apart_come_into_the_band_and_stay(gain):
    seen = simulate(gain)
    inside = [abs(x) < math.log(2.0) for x in seen]
    first = inside.index(True)
    assert first < 20 + 0.8 / gain  # at the bound it cannot be faster than .4 / (.7 gain)
    settled = first + 40
    assert all(inside[settled:])
    assert max(abs(x) for x in seen[-500:]) < 0.4  # the band is .69


def test_plain_dual_ascent_would_oscillate_on_the_same_plant():
    """Why there is a proportional term: the multiplier alone leaves the band again and again."""
    for gain in (0.03, 0.1, 0.3):
        late = simulate(gain, proportional=0.0)[-500:]
        assert max(late) - min(late) > 1.0


# ---- annealing


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [1.0] * 5),
        ("linear", [1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2]),
    ],
)
def test_anneal_factors(kind, expected):
    anneal = Anneal(kind, 0.2, 5)
    assert [anneal(step) for step in range(5)] == pytest.approx(expected)
    assert anneal(7) == pytest.approx(expected[-1])
    assert Anneal(kind, 0.2, 1)(0) == 1.0


def test_annealing_scales_fixed_coefficients():
    control = StageController((-0.06, 0.04), Anneal("linear", 0.0, 3))
    assert [control.coefs(step) for step in range(3)] == [
        (-0.06, 0.04),
        pytest.approx((-0.03, 0.02)),
        (0.0, 0.0),
    ]
    assert control.update(0, [1.0, 1.0]) == control.state_dict() == {}
    assert control.targets(1) == (None, None)


def test_annealing_scales_the_targets_of_dual_not_its_bound():
    dual = ascent((0.06,), targets=(0.4,), floor=0.3)
    control = StageController((0.06,), Anneal("linear", 0.0, 5), dual)
    assert [control.targets(step) for step in range(5)] == [
        (pytest.approx(t),) for t in (0.4, 0.3, 0.3, 0.3, 0.3)
    ]
    assert control.update(1, [0.3])["stage_gap/0"] == pytest.approx(0.0)
    assert control.coefs(4) == (pytest.approx(0.06),)


# ---- config


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("tanh", [-0.0591969, -0.0543089, -0.0277270, 0.0277270, 0.0543089]),
        ("linear", [-0.06, -0.036, -0.012, 0.012, 0.036]),
        ("cosine", [-0.06, -0.0485410, -0.0185410, 0.0185410, 0.0485410]),
        ("step", [-0.06, -0.06, -0.06, 0.06, 0.06]),
    ],
)
def test_schedules_reach_the_coefficients(schedule, expected):
    parsed = parse_arguments(["--entropy.schedule", schedule])
    control = build(parsed.entropy, parsed.phases[-1], build_grammar(parsed))
    assert control is not None
    assert control.coefs(0) == pytest.approx(tuple(expected), abs=1e-7)


def test_an_explicit_schedule_reaches_the_coefficients(tmp_path):
    file = tmp_path / "c.toml"
    stages = [f'[[stages]]\nname = "s{k}"\ncoef = {k - 1}\n' for k in range(3)]
    file.write_text('[entropy]\nschedule = "explicit"\n' + "".join(stages))
    parsed = parse_arguments([str(file)])
    control = build(parsed.entropy, PhaseConfig(), build_grammar(parsed))
    assert control is not None
    assert control.coefs(7) == (-1.0, 0.0, 1.0)


def config(**options: Any) -> EntropyConfig:
    return EntropyConfig(**{"controller": "dual"} | options)


def test_build_takes_the_schedule_and_the_magnitude_as_bound():
    control = build(config(target_fraction=(1.0, 1.0, 1.0, 1.0, 0.5)), PhaseConfig(), GRAMMAR)
    assert control is not None
    assert control.coefs(0) == tuple(GRAMMAR.coefs())
    control.update(0, [1.0] * 5)
    assert control.targets(0) == (1.0, 1.0, 1.0, 1.0, 0.5)
    control.update(1, [100.0] * 5)
    assert control.coefs(2) == (0.06,) * 5
    fixed = build(EntropyConfig(anneal="linear"), PhaseConfig(steps=3), GRAMMAR)
    assert fixed is not None
    assert fixed.coefs(1) == pytest.approx(tuple(0.5 * beta for beta in GRAMMAR.coefs()))
    assert build(config(), PhaseConfig(algorithm="grpo"), GRAMMAR) is None
    assert build(config(), PhaseConfig(), StageGrammar()) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": (0.1, 0.2)}, r"entropy.targets: expected 5 numbers.*got \[0.1, 0.2\]"),
        ({"targets": (0.1, 0.1, 0.1, 0.1, 0.001)}, "at least 0.02 nats"),
        ({"target_fraction": (1.0, 2.0)}, "entropy.target_fraction: expected a positive number"),
        ({"targets": (0.1, 0.1, 0.1, 0.1, math.nan)}, "entropy.targets: expected 5 numbers"),
        ({"target_fraction": math.nan}, "expected a positive number, or 5, one per stage"),
        ({"target_fraction": 0.0}, "--entropy.target_fraction 1.0"),
        ({"target_floor": 0.0}, "entropy.target_floor: expected more than 0"),
        ({"dual_bound": 0.0}, "entropy.dual_bound: expected a positive number, got 0.0"),
        ({"magnitude": 0.0}, "it is entropy.magnitude unless given"),
        ({"dual_bound": 0.01}, "at least the largest coefficient of the schedule, 0.059"),
        ({"dual_integral": -1.0}, "expected no negative number"),
        ({"dual_integral": 0.0, "dual_proportional": 0.0}, "not two zeros"),
    ],
)
def test_refused_numbers(options, message):
    grammar = StageGrammar.preset("mental_r1", magnitude=options.get("magnitude", 0.06))
    with pytest.raises(ConfigError, match=message):
        build(config(**options), PhaseConfig(), grammar)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controller": "duel"}, "entropy.controller: .*Did you mean 'dual'"),
        ({"anneal": "line"}, "entropy.anneal: .*Did you mean 'linear'"),
        ({"anneal_to": -0.5}, "entropy.anneal_to: expected a factor of at least 0"),
    ],
)
def test_refused_choices(options, message):
    with pytest.raises(ConfigError, match=message):
        check(Config(entropy=EntropyConfig(**options)))


def test_a_fraction_is_one_number_or_a_list(tmp_path):
    file = tmp_path / "c.toml"
    for text, expected in (("0.5", 0.5), ("[1, 0.5]", (1.0, 0.5))):
        file.write_text(f"[entropy]\ntarget_fraction = {text}\n")
        assert load_config(file).entropy.target_fraction == expected


def test_numbers_are_refused_before_anything_is_loaded(tmp_path, capsys):
    arguments = [TINY, "--run.dir", str(tmp_path / "r"), "--entropy.controller", "dual"]
    assert train.main([*arguments, "--entropy.targets", "1", "2"]) == 2
    assert "entropy.targets: expected 5 numbers" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


# ---- state


def test_state_survives_a_checkpoint():
    dual = ascent((-0.05, 0.02, 0.01))
    for values in ([0.3, 0.5, None], [0.5, 0.4, None], [0.7, 0.1, None]):
        dual.update(values)
    resumed = ascent((-0.05, 0.02, 0.01))
    resumed.load_state_dict(json.loads(json.dumps(dual.state_dict())))
    assert resumed.coefs == dual.coefs
    for values in ([0.6, 0.2, 0.9], [0.5, None, 0.8]):
        assert resumed.update(values) == dual.update(values)
        assert resumed.coefs == dual.coefs
    with pytest.raises(ValueError, match=r"state: expected the stages \['s0'\]"):
        ascent((0.0,)).load_state_dict(dual.state_dict())


# ---- in a run


@pytest.fixture
def short_stages(monkeypatch):
    """The tiny model closes no tag; here every three tokens are a stage."""
    monkeypatch.setattr(
        StageGrammar, "stage_ids", lambda _, ids, __: [min(i // 3, 4) for i in range(len(ids))]
    )


def run(run_dir: Path, *arguments: str) -> list[dict[str, Any]]:
    assert train.main([TINY, "--run.dir", str(run_dir), *arguments]) == 0
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if not re.match("seconds|tokens_per", k)} for r in records]


DUAL = ("--entropy.controller", "dual", "--entropy.target_fraction", "0.9")


@pytest.mark.usefixtures("short_stages")
def test_a_run_uses_the_entropies_before_each_step_and_resumes_bitwise(tmp_path):
    whole = run(tmp_path / "whole", *DUAL)
    records = [r for r in whole if r["phase"] == "crpo"]
    dual = DualAscent(NAMES, GRAMMAR.coefs(), DualOptions(bound=0.06, fractions=(0.9,)))
    for r in records:
        assert tuple(r[f"stage_coef/{k}"] for k in range(5)) == dual.coefs
        found = dual.update([r[f"stage_entropy/{k}"] for k in range(5)])
        assert len(found) == 10
        assert {k: r[k] for k in found} == found
    assert records[1]["stage_coef/0"] != records[0]["stage_coef/0"]
    assert not any("stage_target/0" in r for r in whole if r["phase"] == "sft")
    parts = tmp_path / "parts"
    assert run(parts, *DUAL, "--train.max_steps", "4") == whole
    # again from the second step of the phase
    for name in ("step_7", "step_8"):
        for file in (parts / "checkpoints" / name).iterdir():
            file.unlink()
        (parts / "checkpoints" / name).rmdir()
    (parts / "summary.json").unlink()
    assert run(parts, *DUAL) == whole
    final = "final/model.safetensors"
    assert (parts / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()


@pytest.mark.usefixtures("short_stages")
def test_annealed_coefficients_are_logged_and_used(tmp_path):
    records = run(tmp_path / "r", "--entropy.anneal", "linear", "--entropy.magnitude", "0.3")
    logged = [r["stage_coef/0"] for r in records if r["phase"] == "crpo"]
    beta = 0.3 * math.tanh(-2.5)
    assert logged == pytest.approx([beta * f for f in (1.0, 2 / 3, 1 / 3, 0.0)])
