"""What the tests of this directory share: a real server and its peers, a browser and its tabs."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import pytest
import pytest_asyncio
from axe_playwright_python.base import AXE_SCRIPT
from playwright.async_api import async_playwright

from bench.peer import Closed, Peer, Proxy, Server

fixture = partial(pytest_asyncio.fixture, loop_scope="session")
settings = pytest.mark.settings  # @settings(CHAT_BEAT="1"), or @settings() for a server of its own
# The server that most tests share forgets all between two of them, and all whom they left there.
SHARED = """
import asyncio, chat
from bench.peer import start_anew
@chat.app.post("/forget")
async def forget():
    for room in list(chat.rooms.values()):
        for member in list(room.members.values()):
            if member.outbox:
                chat.hang_up(member.outbox, 4403, "")
            chat.leave(member, "left")
    start_anew()
    while chat.outboxes:
        await asyncio.sleep(0.005)
    return ""
chat.main()
"""


def pytest_collection_modifyitems(items):
    """Run the tests of this directory in one event loop, because they share one browser."""
    for item in items:
        if item.path.parent == Path(__file__).parent and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest.fixture(scope="session")
def shared():
    server = Server(SHARED)
    yield server
    server.stop()


@fixture
async def server(request):
    """A server that knows nothing but the room PARTY2: the shared one, or one with @settings."""
    mark = request.node.get_closest_marker("settings")
    server = Server(**mark.kwargs) if mark else request.getfixturevalue("shared")
    said = len(server.complaints())
    server.create_room("PARTY2")
    yield server
    await Peer.close_all()
    if mark:
        server.stop()
    else:
        await http(server, "POST /forget HTTP/1.1")
        print(server.complaints()[said:], file=sys.stderr)  # shown if the test has failed


@pytest.fixture(scope="module")
def standing():
    """One server for all tests of a file that only ask it something."""
    server = Server()
    server.create_room("PARTY2")
    yield server
    server.stop()


async def peer(server, name: str, port: int = 0) -> Peer:
    """Join the room PARTY2 on a real server."""
    peer = await Peer.connect(port or server.port, "PARTY2")
    peer.send(hello={"name": name})
    peer.token = re.search('data-token="(.+?)"', await hears(peer, f"{name}</bdi> joined"))[1]
    return peer


async def hears(peer: Peer, text: str) -> str:
    heard = ""
    async with asyncio.timeout(5):
        while text not in heard:
            heard += await peer.receive()
    return heard


async def is_closed(peer: Peer) -> int:
    with pytest.raises(Closed) as end:
        await hears(peer, "what nobody says")
    return end.value.args[0]


def health(server) -> dict:
    with urlopen(f"http://127.0.0.1:{server.port}/healthz") as answer:
        return json.load(answer)


async def until(true) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.05)


async def http(server, *head: str) -> str:
    """Send a request with these lines; return all of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write("\r\n".join([*head, f"Host: 127.0.0.1:{server.port}", "", ""]).encode())
    async with asyncio.timeout(5):
        answer = await reader.readuntil(b"\r\n\r\n")
        size = re.search(rb"content-length: (\d+)", answer)[1]
        answer += await reader.readexactly(int(size))
    writer.close()
    return answer.decode()


def program(*arguments: str, code: str = "import chat; chat.main()") -> tuple[int, str]:
    """Run the program; return its exit code and what it says."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=10,
        check=False,
    )
    return done.returncode, done.stdout


@fixture(scope="session")
async def chromium():
    program = shutil.which("chromium")
    if not program:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "no chromium: the page is not tested"
        )
    async with async_playwright() as playwright:
        # The default switch --disable-back-forward-cache would hide faults of the back button.
        chromium = await playwright.chromium.launch(
            executable_path=program,
            ignore_default_args=["--disable-back-forward-cache"],
            args=[
                "--host-resolver-rules=MAP class.test 127.0.0.1",
                *("--process-per-site", "--renderer-process-limit=1"),  # to start one takes long
            ],
        )
        yield chromium
        await chromium.close()


@fixture
async def browser(chromium, server):
    """The one browser of all tests, in which nothing is left open after each."""
    yield chromium
    for context in chromium.contexts:
        await context.close()


@fixture
async def line(server):
    """A line to the server, which can be cut, or go silent."""
    async with Proxy(server) as line:
        yield line


@fixture
async def tab(browser, server):
    """Open a page in a browser of its own: `ann = await tab()`, which is that of the room PARTY2."""

    async def open_tab(path: str = "/r/PARTY2", at=server, host="127.0.0.1", **context):
        page = await (await browser.new_context(**context)).new_page()
        page.set_default_timeout(8000)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on(
            "console",
            lambda line: "Content Security" in line.text and page.errors.append(line.text),
        )
        await page.goto(f"http://{host}:{at.port}{path}")
        return page

    return open_tab


@fixture
async def join(tab):
    """Let somebody join the room PARTY2: `ann = await join("Ann")`, or `await join("Ann", line)`."""

    async def join_as(name: str, *at, **context):
        return await enters(await tab("/r/PARTY2", *at, **context), name)

    return join_as


async def enters(page, name: str):
    await page.wait_for_selector("#join button:enabled")  # or Enter would do nothing
    await page.fill("#name", name)
    await page.press("#name", "Enter")
    await page.wait_for_selector("[data-state=connected]")
    return page


async def writes(page, text: str) -> None:
    await page.fill("#text", text)
    await page.press("#text", "Enter")


async def shows(page, text: str, where: str = "#log") -> None:
    await page.locator(where).get_by_text(text).first.wait_for()


async def messages(page) -> list[str]:
    return await page.locator("#log .text").all_inner_texts()


async def scroll_up(page) -> None:
    await page.evaluate("document.getElementById('scroller').scrollTop = 0")
    await asyncio.sleep(0.2)  # for the page to have noticed


async def violations(page, **options) -> list[tuple[str, str]]:
    """Return which rules of axe-core the page breaks, and the first element that does."""
    if not await page.evaluate("'axe' in window"):  # it is large: once for each page
        await page.evaluate(AXE_SCRIPT)
    options = {"resultTypes": ["violations"]} | options
    found = await page.evaluate("options => axe.run(options)", options)
    return [(rule["id"], rule["nodes"][0]["html"]) for rule in found["violations"]]


async def transcript(download) -> str:
    return Path(await (await download.value).path()).read_text()


async def stop_the_clock(page) -> None:
    """Let time pass in a page only when the test says so, by page.clock.fast_forward."""
    await page.clock.install()
    await page.clock.pause_at(await page.evaluate("Date.now() + 1000"))


async def agree(one, other, *texts: str) -> None:
    """See that two have these messages in this order, and no other: a fence comes after them."""
    await writes(one, "fence")
    for page in (one, other):
        await shows(page, "fence")
        assert await messages(page) == [*texts, "fence"]
