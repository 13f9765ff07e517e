"""A file of records ends with a whole one, whatever its disk does; what does not fit waits, and why is said."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from flowrl.telemetry import files
from flowrl.telemetry.files import RecordFile

if TYPE_CHECKING:
    from pathlib import Path

RECORDS = [b"first record\n", b"second record\n", b"third record\n"]


@pytest.mark.parametrize("can_cut", [True, False], ids=["full", "read-only, so nothing can be cut off either"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
def test_half_a_record_is_cut_off_before_anything_follows(
    tmp_path: Path, number: int, can_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    file = RecordFile(tmp_path / "records", tell=said.append)
    file.append(RECORDS[0])

    def torn(descriptor: int, body: bytes) -> None:
        os.write(descriptor, body[:5])
        raise OSError(number, os.strerror(number))

    def refused(*where: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_all", torn)
        if not can_cut:
            patched.setattr(os, "ftruncate", refused)
        for record in RECORDS[1:]:
            file.append(record)
        assert file.is_waiting
        assert not can_cut or file.path.read_bytes() == RECORDS[0]
    assert f"({os.strerror(number)}); waiting for room" in said[0]
    assert file.flush()
    assert file.path.read_bytes() == b"".join(RECORDS)
    assert len(said) == 2
