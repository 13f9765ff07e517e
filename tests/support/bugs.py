"""Eight bugs that a flow might have, each planted by a switch, so that the simulations can show that they would see it.

`planted(monkeypatch, name)` changes the classes of the flow for the rest of a test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowrl.messages import Rollouts
from flowrl.runtime.calls import Call, CallGate
from flowrl.runtime.channels import CreditsChannel, RegisterChannel
from flowrl.runtime.queue import QueueChannel

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    Patch = Callable[[type, str, Any], None]


def credit_released_at_publish(patch: Patch) -> None:
    """The writer of a version does not wait for the generators."""

    async def put(self: RegisterChannel, version: int, body: bytes) -> None:
        self.version, self.body = version, body
        for future, _ in self._readers:
            self._readers.grant(future)

    patch(RegisterChannel, "put", put)


def acknowledge_before_commit(patch: Patch) -> None:
    """A receiver's hold ends when it receives, so that nothing is there to be issued again when it dies."""

    def release(self: QueueChannel, consumer: str) -> list[int]:
        for key in [item.key for item in self.holds(consumer)]:
            self.settle(key)
        return []

    patch(QueueChannel, "release", release)


def staleness_read_at_enqueue(patch: Patch) -> None:
    """A sample counts as made by the version that was served when it was handed on."""
    patch(Rollouts, "oldest_version", property(lambda self: max(s.versions[-1].version for s in self.samples)))


def off_by_one_in_the_window(patch: Patch) -> None:
    """An ordered queue delivers one place further ahead than it may."""
    original = QueueChannel.__init__

    def wider(self: QueueChannel, name: str, *, window: int | None, **options: Any) -> None:
        original(self, name, window=None if window is None else window + 1, **options)

    patch(QueueChannel, "__init__", wider)


def drop_oldest_on_full(patch: Patch) -> None:
    """A full queue makes room by forgetting."""

    def has_room(self: QueueChannel, item: Any) -> bool:
        if self.window is None and len(self._waiting) >= self.depth:
            del self._waiting[min(self._waiting)]
        return True

    patch(QueueChannel, "_has_room", has_room)


def no_fence(patch: Patch) -> None:
    """The door serves every incarnation, and a dead one's calls go on."""

    async def call(self: CallGate, call: Call) -> Any:
        return await getattr(self.flow, call.method)(call.replica, *call.arguments)

    patch(CallGate, "call", call)


def double_return_of_a_credit(patch: Patch) -> None:
    """A group's credit comes back as often as it is sent."""

    def give_back(self: CreditsChannel, group_ids: list[int], *, are_learned: bool) -> None:
        for group_id in group_ids:
            self.out.discard(group_id)
            self.num_learned += are_learned
            self.available += 1 + are_learned
        self._serve()

    patch(CreditsChannel, "give_back", give_back)


def lost_tombstone(patch: Patch) -> None:
    """A rejected group's place in the order is not passed over."""
    patch(QueueChannel, "skip", lambda self, key: None)


BUGS: dict[str, Callable[[Patch], None]] = {
    bug.__name__: bug
    for bug in (
        credit_released_at_publish,
        acknowledge_before_commit,
        staleness_read_at_enqueue,
        off_by_one_in_the_window,
        drop_oldest_on_full,
        no_fence,
        double_return_of_a_credit,
        lost_tombstone,
    )
}


def planted(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Plant one bug until the end of the test."""
    BUGS[name](monkeypatch.setattr)
