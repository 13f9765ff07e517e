"""The page of `flowrl feedback` in a real browser, and its server over real sockets: nothing lost, nobody let in."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp.test_utils import TestServer

from flowrl.data.judgments import JUDGMENTS, Judgment, JudgmentFile, Tail
from flowrl.runs.feedback import server
from flowrl.runs.feedback.questions import Questions
from flowrl.runs.feedback.server import TOKEN
from tests.support.browser import BROWSER, Browser
from tests.support.feedback import Served, asking_run
from tests.support.past_run import HOSTILE

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

MARKDOWN = "Take `x`:\n\n```python\ny = 1\n```\n\n- **one**\n- [two](javascript:alert(1))"
READY = "!isBusy && shown !== null"


def written(run_dir: Path) -> list[Judgment]:
    return Tail(run_dir / JUDGMENTS, Judgment).read()


@pytest.mark.skipif(not BROWSER, reason="no chromium on this machine: apt-get install chromium")
def test_a_rater_judges_by_keys_whatever_answers_hold_and_loses_nothing_to_a_kill(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    questions = asking_run(run_dir, [(MARKDOWN, HOSTILE), *((f"a {k}", f"b {k}") for k in range(5))])

    async def rated() -> None:
        with Served(run_dir) as served:
            async with Browser(width=390, height=844) as page:
                await page.open(served.address)
                await page.until("document.activeElement === byId('name')")
                await page.write("ann")
                await page.press("Enter")
                await page.until(READY)
                tags = await page.value("[...byId('answers').querySelectorAll('.text *')].map((each) => each.tagName)")
                assert {"PRE", "CODE", "UL", "LI", "STRONG", "P"} == set(tags), "neither script, picture nor link"
                shown = await page.value("byId('answers').innerText")
                assert "<script>" in shown
                assert "two" in shown
                assert await page.value("document.documentElement.scrollWidth") == 390, "nothing sticks out of a phone"
                await page.press("1")
                await page.until(f"{READY} && shown.id !== '{questions[0].id}'")
                await page.press("u")
                await page.until(f"{READY} && shown.id === '{questions[0].id}'")
                await page.press("ArrowRight")
                await page.until(f"{READY} && shown.id === '{questions[1].id}'")
                served.kill()
                await page.press("3")
                await page.until("byId('trouble').textContent.includes('1 judgment is kept in this browser')")
                other = {"key": "tab", "question": questions[5].id, "rater": "bob", "verdict": "tie"}
                await page.value(f"keep({json.dumps(other)})")  # as another tab of this browser does
                await page.until("byId('trouble').textContent.includes('2 judgments are kept in this browser')")
                (run_dir / TOKEN).unlink()
                served.start()
                await page.until("byId('trouble').textContent.includes('open the page with the address')")
                await page.open("about:blank")  # a page that reloads itself may leave a question without an answer
                await page.open(served.address)
                await page.until(f"{READY} && shown.id === '{questions[2].id}' && byId('trouble').hidden")
                await page.press("e")
                await page.until("document.activeElement.tagName === 'TEXTAREA'")
                await page.write(" mended")
                await page.press("Escape")
                await page.press("e")
                await page.until("byId('answers').innerText.includes(' mended') && !document.querySelector('textarea')")
                await page.press("2")
                await page.until(f"{READY} && shown.id === '{questions[3].id}'")
                await page.press("f")
                await page.write("odd")
                await page.press("Enter")
                await page.until(f"{READY} && shown.id === '{questions[4].id}'")
                await page.press("s")
                await page.until(f"{READY} && shown.id === '{questions[5].id}'")
                assert await page.value("document.title") == "run: feedback", "no script but the page's own has run"
                await page.value(f"keep({json.dumps({**other, 'key': 'strange', 'question': 'of another run'})})")
                await page.press("s")
                await page.until(f"{READY} && outbox().length === 1 && outbox()[0].endsWith('strange')")
                assert [each for each in page.complaints if "status of 40" not in each] == [], (
                    "but what the server refused"
                )

    asyncio.run(rated())
    found = [each for each in written(run_dir) if each.rater == "ann"]
    said = [(each.question, each.verdict) for each in found]
    wanted = ["left", "undone", "right", "tie", "right", "skip", "skip", "skip"]
    assert said == [
        (questions[place].id, verdict) for place, verdict in zip([0, 0, 0, 1, 2, 3, 4, 5], wanted, strict=True)
    ]
    assert [each.flag for each in found][-3:] == ["odd", "", ""]
    assert "mended" in found[4].edits[0]
    assert [each.key for each in written(run_dir) if each.rater == "bob"] == ["tab"]


def test_the_server_takes_only_what_it_should(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    question, other = asking_run(run_dir, [("a", "b"), ("c", "d")])
    judgment = {"key": "k", "question": question.id, "rater": "ann", "verdict": "left"}

    async def tried() -> None:
        with Served(run_dir) as served:
            base, _, token = served.address.partition("#")
            authority = {"Authorization": f"Bearer {token}"}
            async with aiohttp.ClientSession() as session:

                async def post(path: str, body: Any, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
                    data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
                    async with session.post(f"{base}api/{path}", data=data, headers=headers) as response:
                        return response.status, await response.json()

                for headers in ({}, {"Authorization": f"Bearer {token[:-1]}"}, {"Authorization": "Bearer ü"}):
                    assert (await post("judge", judgment, headers))[0] == 401
                for name in ("site.example", f"127.0.0.1.site.example:{served.port}"):
                    assert (await post("judge", judgment, {**authority, "Host": name}))[0] == 421
                assert written(run_dir) == []
                refused = [
                    b"<html>", b"[" * 5000, {**judgment, "verdict": "best"}, {**judgment, "more": 1},
                    {**judgment, "verdict": "rated", "ratings": [1, 2]},
                ]  # fmt: skip
                for body in refused:
                    assert (await post("judge", body, authority))[0] == 400, body
                assert (await post("judge", {**judgment, "question": "of another run"}, authority))[0] == 404
                assert (await post("judge", b" " * (server.MOST_BYTES + 1), authority))[0] == 413
                assert (await post("next", {"rater": "ann"}, authority))[1]["question"]["id"] == question.id
                assert (await post("next", {"rater": "bob"}, authority))[1]["question"]["id"] == other.id
                answers = await asyncio.gather(*(post("judge", judgment, authority) for _ in range(5)))
                assert sorted(answer["again"] for _, answer in answers) == [False, True, True, True, True]
                status, answer = await post("judge", {**judgment, "key": "l", "rater": "bob"}, authority)
                assert (status, answer["saved"], answer["progress"]["several"]) == (200, True, 1)
                async with session.get(base) as response:
                    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
                    assert token not in await response.text()
            open_ones = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(80)]
            try:
                for each in open_ones:
                    each.settimeout(30.0)
                assert b" 503 " in await asyncio.to_thread(open_ones[-1].recv, 100), "one too many"
            finally:
                for each in open_ones:
                    each.close()

    asyncio.run(tried())
    assert [(each.key, each.rater) for each in written(run_dir)] == [("k", "ann"), ("l", "bob")]


def test_who_sends_half_a_request_holds_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_S", 0.1)
    asking_run(tmp_path / "run", [("a", "b")])
    judgments = JudgmentFile(tmp_path / "run" / JUDGMENTS, now=lambda: 0.0)
    names = server.Names("127.0.0.1")
    page = server.Page(tmp_path / "run", Questions(tmp_path / "run"), judgments, "token", names)
    head = "POST /api/next HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer token\r\nContent-Length: 9\r\n\r\nhalf"

    async def tried() -> bytes:
        async with TestServer(page.application()) as running:
            reader, writer = await asyncio.open_connection(running.host, running.port)
            writer.write(head.encode())
            answer = await reader.readuntil(b"\r\n")
            writer.close()
            return answer

    assert b" 408 " in asyncio.run(tried())
    judgments.close()
