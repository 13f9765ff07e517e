"""Every second of a replica is charged to one cause and the causes add up."""

from __future__ import annotations

import random

import pytest

from flowrl.telemetry.events import PRIORITY, Cause, CauseClock, Slots


class Hand:
    """A clock moved by hand."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_time_with_no_mark_is_computing() -> None:
    hand = Hand()
    clock = CauseClock(hand)
    hand.now_s += 3
    assert clock.seconds()[Cause.COMPUTE] == 3


def test_a_running_request_outranks_a_wait_and_an_update_outranks_both() -> None:
    hand = Hand()
    clock = CauseClock(hand)
    with clock.charge(Cause.WAIT_INPUT):
        hand.now_s += 1
        with clock.charge(Cause.COMPUTE):
            hand.now_s += 2
            with clock.charge(Cause.UPDATE):
                hand.now_s += 4
    seconds = clock.seconds()
    assert (seconds[Cause.WAIT_INPUT], seconds[Cause.COMPUTE], seconds[Cause.UPDATE]) == (1, 2, 4)


def test_a_mark_ends_when_its_block_raises() -> None:
    clock = CauseClock(Hand())
    with pytest.raises(ValueError, match="x"), clock.charge(Cause.WAIT_ROOM):
        raise ValueError("x")
    assert clock.cause is Cause.COMPUTE


@pytest.mark.parametrize("seed", range(20))
def test_random_overlapping_marks_add_up_to_the_clocks_age(seed: int) -> None:
    draw, hand = random.Random(seed), Hand()
    clock = CauseClock(hand)
    held = []
    for _ in range(100):
        hand.now_s += draw.random()
        if held and draw.random() < 0.5:
            held.pop(draw.randrange(len(held))).__exit__(None, None, None)
        else:
            mark = clock.charge(draw.choice(list(Cause)))
            mark.__enter__()
            held.append(mark)
    assert sum(clock.seconds().values()) == pytest.approx(hand.now_s - 100.0)


def test_every_cause_has_a_place_in_the_order() -> None:
    assert set(PRIORITY) == set(Cause)


def test_slots_count_each_second_by_the_part_of_them_that_is_filled() -> None:
    hand = Hand()
    slots = Slots(4, hand)
    for running, for_s in ((0, 5.0), (1, 4.0), (4, 1.0), (9, 1.0), (0, 7.0)):  # 5 of 9 wait for a slot
        slots.fill(running)
        hand.now_s += for_s
    assert slots.filled_s() == 1.0 + 1.0 + 1.0
