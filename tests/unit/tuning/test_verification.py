"""How near a prediction came: by hand, and of a run that the simulator itself made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from flowrl.errors import DataError
from flowrl.telemetry.events import Cause
from flowrl.tuning.trials import Trial
from flowrl.tuning.tune import Tuning
from flowrl.tuning.verification import Accuracy, Pair, Verified, accuracy, describe, settled
from tests.support.timed_past import ppo, ppo_costs, timed_past

if TYPE_CHECKING:
    from pathlib import Path


def shares(**pairs: tuple[float, float]) -> dict[str, Pair]:
    return {cause.value: Pair(*pairs.get(cause.value, (0.0, 0.0))) for cause in Cause}


FOUND = Accuracy(
    samples_per_s=Pair(8.0, 9.0),
    staleness=Pair(0.9, 1.0),
    shares={
        "prompts": shares(waiting_for_room=(1.0, 0.99), computing=(0.0, 0.01)),
        "generator": shares(computing=(0.7, 0.9), waiting_for_input=(0.2, 0.05), waiting_for_room=(0.1, 0.05)),
        "learner": shares(computing=(0.5, 0.5), waiting_for_input=(0.5, 0.44), weight_update=(0.0, 0.06)),
    },
)


def test_errors_are_of_the_measured_rate_and_in_parts_of_the_time() -> None:
    assert FOUND.error == pytest.approx(0.125)
    assert FOUND.worst_share == pytest.approx(0.2)
    idle = {node: (pair.measured, pair.predicted) for node, pair in FOUND.idle.items()}
    assert idle.keys() == {"generator", "learner"}, "a node that only waits says nothing of a prediction"
    assert idle["generator"] == pytest.approx((0.3, 0.1))
    assert idle["learner"] == pytest.approx((0.5, 0.44))


def test_a_comparison_says_what_was_measured_first() -> None:
    lines = describe(FOUND, "max_staleness=1").splitlines()
    assert lines[0] == (
        "max_staleness=1: 8.00 samples/s measured, 9.00 predicted (+12.5%); staleness 0.90, 1.00 predicted"
    )
    assert lines[2].split(None, 1) == [
        "generator",
        "computing 70% (90%), waiting for room 10% (5%), waiting for input 20% (5%)",
    ]
    assert lines[-1].endswith("20% of the time")


@pytest.mark.slow
@pytest.mark.parametrize("stale", [0, 1])
def test_of_a_run_that_went_at_a_profile_s_costs_the_prediction_is_right(stale: int, tmp_path: Path) -> None:
    setting, costs = f"max_staleness={stale}", ppo_costs(train_s=0.5)
    found = accuracy(timed_past(tmp_path / "run", costs, setting), ppo(setting).graph, costs)
    assert found.error == pytest.approx(0.0, abs=0.01)
    assert found.staleness.measured == pytest.approx(found.staleness.predicted)
    assert found.worst_share < 0.1  # the statuses are half a second apart


def test_a_prediction_at_wrong_costs_is_found_out(tmp_path: Path) -> None:
    run_dir = timed_past(tmp_path / "run", ppo_costs(token_s=0.05))
    found = accuracy(run_dir, ppo().graph, ppo_costs(token_s=0.02))
    assert found.error > 0.5


def trial(samples_per_s: float, stale: float, **setting: Any) -> Trial:
    return Trial(setting=setting, samples_per_s=samples_per_s, mean_staleness=stale, bottleneck="learner")


def ran(each: Trial, samples_per_s: float) -> Verified:
    found = Accuracy(samples_per_s=Pair(samples_per_s, each.samples_per_s), staleness=Pair(0, 0), shares={})
    return Verified(setting=each.setting, run_dir="", found=found)


def test_what_was_measured_decides_what_is_recommended() -> None:
    present, sync, wide = trial(1.9, 1.0), trial(1.84, 0.0, max_staleness=0), trial(2.4, 1.0, threads=2)
    tuning = Tuning(present=present, front=[sync, wide], recommended=wide, sensitivity={}, looked=[], num_trials=3)
    agreed, lines = settled(tuning, [ran(wide, 2.3), ran(present, 1.97), ran(sync, 1.59)])
    assert agreed.recommended.setting == wide.setting
    assert agreed.recommended.samples_per_s == 2.3
    assert lines[2:] == [
        "  --set threads=2 (+17%)",
        "    staleness 0.00 in place of 1.00 costs 31%: --set max_staleness=0",
    ]
    other, lines = settled(tuning, [ran(wide, 1.4), ran(present, 1.97)])
    assert other.recommended.setting == {}
    assert lines[2] == "  contradicted: threads=2 makes 1.40 samples/s, as it is 1.97"
    assert lines[3] == "  nothing to change: no setting is better"
    alone, lines = settled(tuning, [ran(wide, 1.4)])
    assert alone.recommended.setting == {}, "it is slower than the present one is predicted to be"


def test_a_run_of_one_step_cannot_be_compared(tmp_path: Path) -> None:
    run_dir = timed_past(tmp_path / "run", ppo_costs(), "steps=2")
    lines = [line for line in (run_dir / "metrics.jsonl").read_text().splitlines() if '"version":2' not in line]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="learned fewer than two steps"):
        accuracy(run_dir, ppo().graph, ppo_costs())
