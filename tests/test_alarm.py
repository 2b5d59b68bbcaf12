"""The entropy alarm."""

import json
import math

import pytest

from crpo_fast.alarm import EntropyAlarm, build
from crpo_fast.config import ConfigError, EntropyConfig, PhaseConfig, parse_arguments


def alarm(**options):
    return EntropyAlarm(
        ["a", "b"], **{"warn_factor": 2.0, "stop_factor": 4.0, "floor": 0.5} | options
    )


def test_warns_once_per_stage_and_then_stops():
    watch = alarm(start_steps=2)
    assert watch.update(0, [0.9, 2.0]) == watch.update(1, [1.1, 2.0])  # starts: 1.0 and 2.0
    assert watch.update(2, [2.0, 4.0]).warnings == ()
    (warning,) = watch.update(3, [2.1, 4.0]).warnings
    assert "stage 'a'" in warning
    assert "at most 2 nats" in warning
    assert "got 2.1 at step 3" in warning
    assert watch.update(4, [3.0, 4.0]).warnings == ()
    verdict = watch.update(5, [3.0, 4.1])
    assert verdict.stop is None
    assert len(verdict.warnings) == 1
    verdict = watch.update(6, [4.1, 9.0])
    assert verdict.warnings == ()
    for word in (
        "stage 'a'",
        "stage 'b'",
        "at most 8 nats",
        "entropy.magnitude",
        "reference_length",
    ):
        assert word in verdict.stop


def test_floor_keeps_small_starts_quiet():
    watch = alarm(start_steps=1)
    watch.update(0, [0.01, 0.01])
    assert watch.update(1, [0.9, 1.0]).warnings == ()
    assert watch.update(2, [1.1, 2.1]).stop.startswith("stage 'b'")


def test_a_controlled_stage_is_judged_by_its_target_and_gets_other_advice():
    watch = alarm(start_steps=1, is_controlled=True)
    watch.update(0, [1.0, 1.0], (None, 3.0))
    verdict = watch.update(1, [2.1, 5.9], (None, 3.0))
    (warning,) = verdict.warnings  # of a; b may reach twice its target
    assert "stage 'a'" in warning
    assert "at most 2 nats (2 times its start or target" in warning
    stop = watch.update(2, [1.0, 12.1], (1.0, 3.0)).stop
    assert "stage 'b': expected an entropy of at most 12 nats" in stop
    assert "The dual controller cannot hold it" in stop
    assert "entropy.dual_bound" in stop
    assert "entropy.magnitude" not in stop


def test_advice_names_the_controller():
    watch = alarm(start_steps=1)
    watch.update(0, [1.0, 1.0])
    stop = watch.update(1, [9.0, 1.0]).stop
    assert 'entropy.controller = "dual"' in stop
    assert stop.endswith("--entropy.no-alarm turns this off.")
    assert not parse_arguments(["--entropy.no-alarm"]).entropy.alarm


def test_build_reads_the_config():
    assert build(EntropyConfig(), PhaseConfig(algorithm="sft"), ["a"]) is None
    assert build(EntropyConfig(alarm=False), PhaseConfig(), ["a"]) is None
    assert build(EntropyConfig(), PhaseConfig(), []) is None
    entropy = EntropyConfig(
        controller="dual", alarm_warn_factor=2.0, alarm_stop_factor=5.0, alarm_floor=0.1
    )
    for algorithm in ("crpo", "grpo"):
        watch = build(entropy, PhaseConfig(algorithm=algorithm), ["a"])
        assert (watch.warn_factor, watch.stop_factor, watch.floor) == (2.0, 5.0, 0.1)
        assert watch.is_controlled == (algorithm == "crpo")


@pytest.mark.parametrize(
    "options", [{"alarm_warn_factor": 0.5}, {"alarm_stop_factor": math.nan}, {"alarm_floor": -1.0}]
)
def test_build_refuses_what_the_user_can_correct(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"entropy.{name}.* Type --entropy"):
        build(EntropyConfig(**options), PhaseConfig(), ["a"])


def test_a_stage_that_is_absent_starts_later():
    watch = alarm(start_steps=1)
    watch.update(0, [1.0, None])
    watch.update(1, [1.0, math.nan])
    assert watch.update(2, [1.0, 3.0]).stop is None  # the start of b
    assert len(watch.update(3, [1.0, 6.5]).warnings) == 1


def test_state_survives_a_checkpoint():
    watch = alarm(start_steps=2)
    for step, values in enumerate([[1.0, 1.0], [1.0, 1.0], [2.5, 1.0]]):
        watch.update(step, values)
    resumed = alarm(start_steps=2)
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert resumed.update(3, [2.5, 2.5]).warnings == watch.update(3, [2.5, 2.5]).warnings
    assert resumed.state_dict() == watch.state_dict()
    assert resumed.update(4, [4.1, 1.0]).stop
    with pytest.raises(ValueError, match=r"state: expected the stages \['c'\], got \['a', 'b'\]"):
        EntropyAlarm(["c"]).load_state_dict(watch.state_dict())


def test_saved_state_does_not_change_with_the_alarm():
    watch = alarm(start_steps=3)
    watch.update(0, [1.0, 1.0])
    state = watch.state_dict()
    watch.update(1, [2.0, 2.0])
    assert state["first"] == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: alarm(warn_factor=1.0), "expected 1 < warn <= stop, got 1.0 and 4.0"),
        (lambda: alarm(warn_factor=5.0), "expected 1 < warn <= stop"),
        (lambda: alarm(floor=0.0), "more than 0 nats"),
        (lambda: alarm(start_steps=0), "at least 1 step"),
        (lambda: alarm().update(0, [1.0]), "one per stage, 2, got 1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
