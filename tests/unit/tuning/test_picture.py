"""The picture of a tuning shows every setting that was looked at, where it belongs."""

from __future__ import annotations

from xml.etree import ElementTree

from flowrl.tuning.picture import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, picture
from flowrl.tuning.tune import Tuning
from tests.unit.tuning.test_tune import trial

SVG = "{http://www.w3.org/2000/svg}"


def test_every_point_lies_within_the_axes_and_higher_is_faster() -> None:
    slow, fast = trial(1.0, 0, a=1), trial(4.0, 2, a=2)
    looked = [(1.0, 0.0), (2.0, 1.0), (4.0, 2.0)]
    tuning = Tuning(present=slow, front=[slow, fast], recommended=fast, sensitivity={}, looked=looked, num_trials=3)
    root = ElementTree.fromstring(picture(tuning))
    places = {
        kind: [(float(each.attrib["cx"]), float(each.attrib["cy"])) for each in root.iter(f"{SVG}circle")
               if each.get("class") == kind and each.get("r") in ("3", "5", "6")]
        for kind in ("tried", "best", "present")
    }  # fmt: skip
    tried = places["tried"][: len(looked)]
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in tried)
    assert [x for x, _ in tried] == sorted({x for x, _ in tried}), "staler is further to the right"
    assert [y for _, y in tried] == sorted({y for _, y in tried}, reverse=True), "faster is further up"
    assert places["best"][:2] == [tried[0], tried[2]]
    assert places["present"][0] == tried[0]
    assert any("a=2" in (title.text or "") for title in root.iter(f"{SVG}title"))
