"""Whatever is done to a run's files, verify says what is wrong and where, and never fails to say something."""

from __future__ import annotations

import os
import random
import shutil
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flowrl.engines.checkpoint import CheckpointWriter
from flowrl.errors import UserError
from flowrl.runs.verify import describe, verify_run
from flowrl.runtime.ledger import Cut, Entry, encode_entry, read_entries
from flowrl.telemetry.files import run_id, seal, unseal
from flowrl.telemetry.records import read_samples, write_digests, write_rollouts
from flowrl.telemetry.report import Ending, write_ending
from tests.support.past_run import past_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Harm = Callable[[Path], object]

NEWEST = "checkpoints/step-000006"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps of four groups, with every record."""
    run_dir = past_run(tmp_path_factory.mktemp("runs") / "run")
    for version in range(7):
        write_digests(run_dir, version, {"weight": f"{version:016x}"})
    writer = CheckpointWriter(run_dir / "checkpoints", keep=2)
    for version in (3, 6):
        aside = writer.begin(version)
        (aside / "weights").write_bytes(bytes([version]) * 100)
        digest = blake2b(b"".join(lines_of(run_dir / "ledger.jsonl")[: 8 * version]), digest_size=16).hexdigest()
        cut = Cut(version=version, next_group=4 * version, records=8 * version, learned=4 * version,
                  run=run_id(run_dir), digest=digest)  # fmt: skip
        writer.commit(aside, version=version, cut=msgspec.json.encode(cut), score=0.0)
    totals = {"admitted": 25, "learned": 24, "filtered": 1, "failed": 0, "unfinished": 0}
    write_ending(run_dir, Ending(name="run", totals=totals, checkpoint=f"runs/run/{NEWEST}"))
    return run_dir


@pytest.fixture
def run_dir(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "run")


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def keep_lines(count: int, name: str) -> Harm:
    return lambda run_dir: (run_dir / name).write_bytes(b"".join(lines_of(run_dir / name)[:count]))


def drop_lines(count: int, name: str) -> Harm:
    return lambda run_dir: (run_dir / name).write_bytes(b"".join(lines_of(run_dir / name)[count:]))


def write(name: str, body: bytes) -> Harm:
    return lambda run_dir: (run_dir / name).write_bytes(body)


def remove(name: str) -> Harm:
    def removed(run_dir: Path) -> None:
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return removed


def change(name: str, old: str, new: str) -> Harm:
    def changed(run_dir: Path) -> None:
        text = (run_dir / name).read_text()
        assert old in text, f"{old!r} is not in {name}"
        (run_dir / name).write_text(text.replace(old, new, 1))

    return changed


def flip(name: str) -> Harm:
    def flipped(run_dir: Path) -> None:
        body = bytearray((run_dir / name).read_bytes())
        body[len(body) // 2] ^= 1
        (run_dir / name).write_bytes(body)

    return flipped


def forge(*entries: Entry) -> Harm:
    """Append well-sealed entries, as somebody would who knows the form."""

    def forged(run_dir: Path) -> None:
        with (run_dir / "ledger.jsonl").open("ab") as file:
            file.writelines(map(encode_entry, entries))

    return forged


def drop(event: str, group: int) -> Harm:
    """Take a line out of the ledger."""

    def dropped(run_dir: Path) -> None:
        path = run_dir / "ledger.jsonl"
        kept = [e for e in read_entries(path) if (e.event, e.group) != (event, group)]
        path.write_bytes(b"".join(map(encode_entry, kept)))

    return dropped


def of_another_run(name: str) -> Harm:
    """Put in what a run of the same graph and settings has in that place."""

    def swapped(run_dir: Path) -> None:
        other = shutil.copytree(run_dir, run_dir.parent / "other")
        starts = other / "starts.jsonl"
        starts.write_bytes(seal(unseal(starts.read_bytes()).replace(b'"time_s":', b'"time_s":1')))
        if name.startswith("rollouts"):
            write_rollouts(other / name, read_samples(other / name), 2)
        else:
            cut = msgspec.json.decode((other / name / "cut.json").read_bytes(), type=Cut)
            writer = CheckpointWriter(other / "checkpoints", keep=2)
            aside = writer.begin(cut.version)
            foreign = msgspec.structs.replace(cut, run=run_id(other))
            writer.commit(aside, version=cut.version, cut=msgspec.json.encode(foreign), score=0.0)
            shutil.rmtree(run_dir / name)
        (other / name).rename(run_dir / name)

    return swapped


def reworded(line: int, **changes: Any) -> Harm:
    """Change an entry of the ledger and seal it again, as somebody would who knows the form."""

    def changed(run_dir: Path) -> None:
        path = run_dir / "ledger.jsonl"
        entries = read_entries(path)
        entries[line] = msgspec.structs.replace(entries[line], **changes)
        path.write_bytes(b"".join(map(encode_entry, entries)))

    return changed


def pipe(name: str) -> Harm:
    def piped(run_dir: Path) -> None:
        (run_dir / name).unlink()
        os.mkfifo(run_dir / name)

    return piped


def directory(name: str) -> Harm:
    def directed(run_dir: Path) -> None:
        (run_dir / name).unlink()
        (run_dir / name).mkdir()

    return directed


def double(name: str) -> Harm:
    return lambda run_dir: (run_dir / name).write_bytes((run_dir / name).read_bytes() * 2)


def swap_last_lines(run_dir: Path) -> None:
    *before, admitted, ended = lines_of(run_dir / "ledger.jsonl")
    (run_dir / "ledger.jsonl").write_bytes(b"".join([*before, ended, admitted]))


def swap_rollouts(run_dir: Path) -> None:
    shutil.copy(run_dir / "rollouts" / "step-000001.parquet", run_dir / "rollouts" / "step-000002.parquet")


DAMAGES: dict[str, tuple[Harm, str]] = {
    "ledger emptied": (write("ledger.jsonl", b""), "was made after 48 entries of the ledger, which has 0"),
    "ledger gone": (remove("ledger.jsonl"), "ledger.jsonl: is not there"),
    "ledger a pipe": (pipe("ledger.jsonl"), "ledger.jsonl: is no file"),
    "ledger halved": (keep_lines(20, "ledger.jsonl"), "which has 20"),
    "ledger without its last entry": (keep_lines(49, "ledger.jsonl"), "ending.json: the run ended with"),
    "ledger cut at the checkpoint": (keep_lines(48, "ledger.jsonl"), "ending.json: the run ended with"),
    "ledger flipped in the middle": (flip("ledger.jsonl"), "ledger.jsonl:"),
    "ledger of other bytes": (write("ledger.jsonl", bytes(range(256)) * 4), "ledger.jsonl:1: is damaged"),
    "ledger of zeros": (write("ledger.jsonl", b"\0" * 4096 + b"\n\n"), "ledger.jsonl:1: is damaged"),
    "an admission taken out": (drop("admitted", 9), "lost       1: groups 9"),
    "an ending taken out": (drop("learned", 9), "lost       1: groups 9"),
    "a group learned twice": (forge(Entry(event="learned", group=3, step=5, oldest=5)), "duplicated 1: groups 3"),
    "an ending before its admission": (swap_last_lines, "groups 24 end before they are admitted"),
    "two ledgers in one": (double("ledger.jsonl"), "and 5 more end before they are admitted, or are twice"),
    "a group too old": (
        forge(Entry(event="admitted", group=25), Entry(event="learned", group=25, step=5, oldest=0)),
        "over-stale 1: groups 25",
    ),
    "a group beyond all numbers": (forge(Entry(event="admitted", group=1 << 60)), "lost "),
    "an entry nested too deep": (
        write("ledger.jsonl", encode_entry(Entry(event="admitted", group=0))[:-10] + b"[" * 9999 + b"\n\n"),
        "ledger.jsonl:1: is damaged",
    ),
    "an ending's step changed": (reworded(17, step=4), "its first 48 entries are not those before the checkpoint"),
    "rollouts of another run": (
        of_another_run("rollouts/step-000002.parquet"),
        "parquet: is of another run",
    ),
    "a checkpoint of another run": (of_another_run(NEWEST), "the checkpoint of version 6 is of another run"),
    "rollouts gone": (remove("rollouts"), "missing: rollouts/step-000000.parquet"),
    "one step's rollouts gone": (remove("rollouts/step-000002.parquet"), "missing: rollouts/step-000002.parquet"),
    "the newest rollouts gone": (remove("rollouts/step-000005.parquet"), "missing: rollouts/step-000005.parquet"),
    "rollouts of another step": (swap_rollouts, "step 2: groups 4, 5, 6, 7, 8, 9, 10, 11 are in one of ledger and"),
    "rollouts emptied": (write("rollouts/step-000002.parquet", b""), "step-000002.parquet: cannot be read"),
    "rollouts of other bytes": (write("rollouts/step-000002.parquet", b"PAR1" * 99), "parquet: cannot be read"),
    "rollouts of a step that never was": (write("rollouts/step-000099.parquet", b"x"), "parquet: cannot be read"),
    "settings emptied": (write("settings.yaml", b""), "settings.yaml: holds no settings"),
    "settings gone": (remove("settings.yaml"), "holds no run"),
    "settings of a list": (write("settings.yaml", b"- 1\n"), "settings.yaml: holds no settings"),
    "settings not text": (write("settings.yaml", b"\xff\xfe\x00"), "settings.yaml: is not valid YAML"),
    "settings not YAML": (write("settings.yaml", b"a: [1\n"), "settings.yaml:2: is not valid YAML"),
    "settings nested too deep": (write("settings.yaml", b"a: " + b"[" * 500), "holds an invalid value"),
    "settings without an end": (write("settings.yaml", b"x" * (5 << 20)), "settings.yaml: has 5,242,880 bytes"),
    "settings of too long a number": (write("settings.yaml", b"a: " + b"9" * 5000), "holds an invalid value"),
    "a bound raised afterwards": (change("settings.yaml", "max_staleness: 1", "max_staleness: 9"), "file was changed"),
    "fewer steps afterwards": (change("settings.yaml", "steps: 6", "steps: 3"), "the file was changed"),
    "starts gone": (remove("starts.jsonl"), "missing: starts.jsonl"),
    "starts changed": (change("starts.jsonl", '"max_staleness":1', '"max_staleness":9'), "starts.jsonl:1: is damaged"),
    "graph gone": (remove("graph.json"), "graph.json: cannot be read"),
    "graph changed": (change("graph.json", '"depth": ', '"depth": 1'), "graph.json: is not the graph"),
    "graph not JSON": (write("graph.json", b"{"), "graph.json: cannot be read"),
    "versions gone": (remove("versions.jsonl"), "missing: versions.jsonl"),
    "versions shortened": (keep_lines(4, "versions.jsonl"), "versions.jsonl: lacks versions 4, 5, 6"),
    "versions without the first ones": (drop_lines(2, "versions.jsonl"), "versions.jsonl: lacks versions 0, 1"),
    "metrics gone": (remove("metrics.jsonl"), "missing: metrics.jsonl"),
    "metrics a directory": (directory("metrics.jsonl"), "metrics.jsonl: is no file"),
    "metrics of other bytes": (write("metrics.jsonl", b"\xff\xfe\0" * 99), "versions 1, 2, 3, 4, 5, 6 are not known"),
    "metrics shortened": (keep_lines(4, "metrics.jsonl"), "missing: metrics.jsonl: the figures of versions 4, 5, 6"),
    "ending of other bytes": (write("ending.json", b"[[["), "ending.json: is damaged"),
    "versions a directory": (directory("versions.jsonl"), "versions.jsonl: is no file"),
    "the newest checkpoint gone": (remove(NEWEST), "missing: checkpoints/step-000006"),
    "checkpoints gone": (remove("checkpoints"), "missing: checkpoints/step-000006"),
    "weights flipped": (flip(f"{NEWEST}/weights"), "checkpoints/step-000006: weights has 100 bytes"),
    "weights a pipe": (pipe(f"{NEWEST}/weights"), "checkpoints/step-000006: weights is no file"),
    "weights shortened": (write(f"{NEWEST}/weights", b"x"), "weights has 1 bytes, written were 100"),
    "weights gone": (remove(f"{NEWEST}/weights"), "checkpoints/step-000006: weights is missing"),
    "manifest gone": (remove(f"{NEWEST}/manifest.json"), "step-000006: manifest.json cannot be read"),
    "manifest a pipe": (pipe(f"{NEWEST}/manifest.json"), "step-000006: manifest.json cannot be read"),
    "manifest nested too deep": (write(f"{NEWEST}/manifest.json", b"[" * 99999), "manifest.json cannot be read"),
    "manifest emptied": (write(f"{NEWEST}/manifest.json", b""), "step-000006: manifest.json cannot be read"),
    "manifest changed": (change(f"{NEWEST}/manifest.json", '"version":6', '"version":7'), "its digest does not fit"),
    "cut changed": (change(f"{NEWEST}/cut.json", '"learned":24', '"learned":23'), "step-000006: cut.json has"),
    "a checkpoint renamed": (
        lambda run_dir: (run_dir / NEWEST).rename(run_dir / "checkpoints" / "step-000009"),
        "step-000009: its manifest is of version 6",
    ),
}


def test_a_sound_run_is_clean(run_dir: Path) -> None:
    verdict = verify_run(run_dir)
    assert verdict.is_clean, describe(verdict, run_dir)
    assert verdict.strays == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_named(run_dir: Path, damage: str) -> None:
    harm, said = DAMAGES[damage]
    harm(run_dir)
    try:
        verdict = verify_run(run_dir)
    except UserError as error:
        text = str(error)
    else:
        text = describe(verdict, run_dir)
        assert not verdict.is_clean, text
    assert said in text


def test_stray_files_are_said_and_harm_nothing(run_dir: Path) -> None:
    for name in (f"{NEWEST}/.nfs0000001", "rollouts/.step-000003.parquet.swp", "rollouts/notes~"):
        (run_dir / name).write_bytes(b"x")
    (run_dir / "rollouts" / "replaced").mkdir()
    verdict = verify_run(run_dir)
    assert verdict.is_clean
    assert sorted(verdict.strays) == [f"{NEWEST}/.nfs0000001", "rollouts/.step-000003.parquet.swp", "rollouts/notes~"]


@pytest.mark.slow
def test_any_byte_of_the_proof_that_changes_is_found(run_dir: Path) -> None:
    """A seeded fuzzer: one byte of one record, changed or cut off."""
    seed = 20261129
    draw = random.Random(seed)
    names = ["ledger.jsonl", "settings.yaml", "graph.json", "starts.jsonl", f"{NEWEST}/cut.json", f"{NEWEST}/weights"]
    for turn in range(40):
        path = run_dir / draw.choice(names)
        whole = path.read_bytes()
        place = draw.randrange(len(whole))
        if draw.random() < 0.5:
            body = whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :]
        else:
            body = whole[:place]
        path.write_bytes(body)
        try:
            is_found = not verify_run(run_dir).is_clean
        except UserError:
            is_found = True
        finally:
            path.write_bytes(whole)
        harmless = path.suffix == ".yaml" and body.split() == whole.split()
        assert is_found or harmless, f"seed {seed}, turn {turn}: byte {place} of {path.name}"
