"""Fake engines on shared devices that note who is awake there, and when somebody computes who should not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from flowrl.simulation.fake import FakeGeneration, FakeTraining

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.engines.base import Ranks, TokenGroup, UpdateReport
    from flowrl.messages import Sample, Weights


class Devices:
    """The one set of devices of a test's run."""

    awake: ClassVar[dict[int, str]] = {}  # engine -> its side
    wrong: ClassVar[list[str]] = []
    num_wakes: ClassVar[int] = 0

    @classmethod
    def clear(cls) -> None:
        cls.awake.clear()
        cls.wrong.clear()
        cls.num_wakes = 0

    @classmethod
    def arrive(cls, engine: object, side: str) -> None:
        cls.awake[id(engine)] = side
        cls.look(engine, side)

    @classmethod
    def depart(cls, engine: object) -> None:
        cls.awake.pop(id(engine), None)

    @classmethod
    def look(cls, engine: object, side: str) -> None:
        if cls.awake.get(id(engine)) != side:
            cls.wrong.append(f"{side} computes asleep")
        if others := {other for other in cls.awake.values() if other != side}:
            cls.wrong.append(f"{side} computes beside {others}")


class SharedTraining(FakeTraining):
    side = "training"

    def open(self, ranks: Ranks | None = None) -> None:
        Devices.arrive(self, self.side)

    def _spend(self, kind: str, groups: Sequence[TokenGroup]) -> None:
        Devices.look(self, self.side)
        super()._spend(kind, groups)

    def publish(self, *arguments: Any) -> Weights:
        Devices.look(self, self.side)
        return super().publish(*arguments)

    def sleep(self) -> None:
        Devices.depart(self)
        super().sleep()

    def wake(self) -> None:
        Devices.num_wakes += 1
        Devices.arrive(self, self.side)
        super().wake()

    def close(self) -> None:
        Devices.depart(self)
        super().close()


class SharedGeneration(FakeGeneration):
    side = "sampling"

    async def open(self) -> None:
        Devices.arrive(self, self.side)

    async def generate(self, **request: Any) -> list[Sample]:
        Devices.look(self, self.side)
        samples = await super().generate(**request)
        Devices.look(self, self.side)
        return samples

    async def update_weights(self, weights: Weights) -> UpdateReport:
        Devices.look(self, self.side)
        report = await super().update_weights(weights)
        Devices.look(self, self.side)
        return report

    async def sleep(self) -> None:
        await super().sleep()
        Devices.depart(self)

    async def wake(self) -> None:
        Devices.num_wakes += 1
        Devices.arrive(self, self.side)
        await super().wake()

    async def close(self) -> None:
        Devices.depart(self)
