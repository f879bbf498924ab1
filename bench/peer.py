"""What the programs of this folder and the tests share: a real server, a client, and how to read it."""

import asyncio
import base64
import json
import logging
import os
import random
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, NamedTuple, Self
from urllib.request import Request, urlopen

HERE = Path(__file__).parent.parent  # the project's folder
logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of writing to what we broke
FREE = {  # without the limits that guard against floods; the rest stays as it is
    "CHAT_RATE": "1e9",
    "CHAT_BURST": "1000000000",
    "CHAT_SHARE": "1e9",
    "CHAT_MEMBERS": "2000",
    "CHAT_SOCKETS": "4000",
    "CHAT_SOCKETS_PER_ADDRESS": "4000",
    "CHAT_NEW_ROOMS": "1000000000",
} | {  # what they were called before, for --against
    "CHAT_MESSAGE_RATE": "1e9",
    "CHAT_MESSAGE_BURST": "1e9",
    "CHAT_FRAME_RATE": "1e9",
    "CHAT_FRAME_BURST": "1e9",
    "CHAT_NEW_ROOM_BURST": "1e9",
    "CHAT_JOIN_DEADLINE": "60",
}
CHAOS = {  # so that connections are lost and evicted soon, and nothing is forgotten
    "CHAT_BEAT": "0.3",
    "CHAT_OUTBOX_BYTES": "16384",
    "CHAT_HISTORY": "1000000000",
    "CHAT_HISTORY_BYTES": "1000000000",
    "CHAT_SECRET": "kept through the restarts",
} | {"CHAT_SILENCE": "3", "CHAT_OUTBOX": "8", "CHAT_TALK_BYTES": "1000000000000"}  # of before
SABOTAGE = {  # what --prove plants, as a program to run instead of chat.py
    "": "import chat; chat.main()",
    "without dedupe": "import chat; chat.hash = lambda id: object(); chat.main()",  # never equal
    "without resume": "import chat; enter = chat.enter; chat.enter = lambda member, outbox, after: "
    "enter(member, outbox, member.room.seq if after else 0); chat.main()",
    "without gap lines": "import chat; chat.fragments.gap = lambda *_, **__: ''; chat.main()",
}
ENTRY = re.compile(
    r'<li id="e\d+" class="(\w+)[^>]*? data-seq="(\d+)"(?: data-from="(\w+)" data-id="([\w-]+)")?'
    r'|<li class="(gap)" data-seq="(\d+)"'
)
RESET = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)  # makes close send a RST
BUSY = """
import asyncio, chat, guards
@chat.app.websocket("/r/BUSY22/ws")
async def busy():
    await chat.websocket.accept()
    await asyncio.sleep(60)
"""


def start_anew() -> None:
    """Have the chat of this process forget all but connections, as a restart would."""
    import chat  # here only: others know it through its sockets

    for known in (chat.rooms, chat.runs_seen, chat.noted):
        known.clear()
    for cache in (chat.share_of, chat.quota):
        cache.cache_clear()


class Closed(Exception):
    """The connection has ended; has the close code, or 1006 if there was none."""


class Server:
    """A real server on a free port of the loopback, in a process of its own."""

    def __init__(
        self,
        program=SABOTAGE[""],
        core: int | None = None,
        end=signal.SIGTERM,
        free: dict[str, str] = FREE,  # settings, of which those are used that this chat.py knows
        folder: Path = HERE,
        **settings: str,
    ):
        self.program, self.core, self.end, self.folder = program, core, end, folder
        known = re.findall(r'^    "([A-Z_]+)": \(', (folder / "chat.py").read_text(), re.MULTILINE)
        self.free = {name: free[name] for name in free if name.removeprefix("CHAT_") in known}
        self.start(**settings)

    def start(self, **settings) -> None:
        """Start it, also again after stop, with these settings instead of those before."""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - what it says on stderr, closed by stop
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.program, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=self.folder,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | self.free | settings,
        )
        if self.core is not None:
            os.sched_setaffinity(self.process.pid, {self.core})
        self.banner = self.process.stdout.readline().decode()
        self.port = int(re.search(r":(\d+)", self.banner)[1])

    def create_room(self, code: str) -> None:
        address = f"http://127.0.0.1:{self.port}"
        urlopen(Request(f"{address}/r/{code}", b"", {"Origin": address})).close()

    def memory(self) -> int:
        """Return the resident set, in bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def peak(self) -> int:
        """Return the largest resident set since the last call, in bytes."""
        peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # begins a new measurement
        return int(peak) * 1024

    def busy(self) -> float:
        """Return the seconds that it has had the processor."""
        times = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")

    def complaints(self) -> str:
        """Return what it has said on stderr so far."""
        self.log.seek(0)
        return self.log.read().decode()

    def sockets(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> None:
        if self.log.closed:
            return
        self.process.send_signal(self.end)
        self.process.wait(6)
        self.process.stdout.close()
        for line in self.complaints().splitlines():
            if not line.startswith(("INFO", "WARNING")):  # limits reached, and closes
                print(line, file=sys.stderr)
        self.log.close()


class Many:
    """Servers behind an nginx, which runs as deploy/nginx-many.conf says, on free ports."""

    SETTINGS: ClassVar = {"CHAT_SECRET": "shared by all of them", "CHAT_PROXIES": "1"}
    banner, create_room = "", Server.create_room

    def __init__(self, folder: Path, count: int = 4):
        with ThreadPoolExecutor() as pool:  # all at once
            settings = {"end": signal.SIGKILL, **self.SETTINGS}
            self.servers = list(pool.map(lambda _: Server(**settings), range(count)))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        ports = dict(zip(range(8001, 8005), [server.port for server in self.servers], strict=False))
        ports[8080] = self.port
        config = (HERE / "deploy" / "nginx-many.conf").read_text()
        for port in {8001, 8002, 8003, 8004} - ports.keys():
            config = re.sub(rf".*127.0.0.1:{port}.*", "", config)
        config = re.sub(r"(?<=127\.0\.0\.1:)\d+", lambda port: str(ports[int(port[0])]), config)
        (folder / "nginx.conf").write_text(config)
        nginx = ["nginx", "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]
        self.nginx = subprocess.Popen([*nginx, "-g", "daemon off;"])

    async def start(self) -> None:
        async with asyncio.timeout(20):
            while True:
                try:
                    return socket.create_connection(("127.0.0.1", self.port)).close()
                except ConnectionRefusedError:
                    await asyncio.sleep(0.05)

    def stop(self) -> None:
        self.nginx.terminate()
        self.nginx.wait(10)
        for server in self.servers:
            server.stop()


def forwarded(address: str) -> str:
    """Return the header with which a proxy tells an address."""
    return "" if address == "127.0.0.1" else f"X-Forwarded-For: {address}\r\n"


async def fetch(
    port: int, path: str, method="GET", address="127.0.0.1", headers="", host="127.0.0.1"
) -> tuple[int, bytes]:
    """Send one HTTP request; return the status and all that came."""
    peer = await Peer.dial(port, address)
    peer.writer.write(
        f"{method} {path} HTTP/1.1\r\nHost: {host}:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n"
        f"Connection: close\r\n{forwarded(address)}{headers}\r\n".encode()
    )
    try:
        answer = await peer.reader.read()
    finally:
        peer.close()
    if not answer:
        raise Closed(1006)
    return int(answer.split(b" ", 2)[1]), answer


class Peer:
    """A WebSocket client with no more of RFC 6455 than is needed here."""

    open: ClassVar[set["Peer"]] = set()
    offer = "Sec-WebSocket-Extensions: permessage-deflate\r\n"  # as browsers do
    lingers: asyncio.Task | None = None
    inflate = None  # where the server compresses
    rest = b""

    @classmethod
    async def connect(cls, port: int, code: str, address: str = "127.0.0.1") -> "Peer":
        peer = await cls.dial(port, address)
        key = base64.b64encode(os.urandom(16)).decode()
        peer.writer.write(
            f"GET /r/{code}/ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Origin: http://127.0.0.1:{port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
            f"{forwarded(address)}{cls.offer}\r\n".encode()
        )
        try:
            head = await peer.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            raise Closed(1006) from None
        if not head.startswith(b"HTTP/1.1 101"):
            raise Closed(head.split(b"\r\n")[0].decode())
        if b"permessage-deflate" in head:
            peer.inflate = zlib.decompressobj(-15)
        return peer

    @classmethod
    async def dial(cls, port: int, address: str = "127.0.0.1") -> "Peer":
        """Connect, and say nothing yet, from this address: all of 127.0.0.0/8 is this machine."""
        peer, near = cls(), socket.socket()
        near.setblocking(False)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)  # or bursts find it full
        near.bind((address if address.startswith("127.") else "127.0.0.1", 0))
        try:
            await asyncio.get_running_loop().sock_connect(near, ("127.0.0.1", port))
        except BaseException:
            near.close()
            raise
        peer.reader, peer.writer = await asyncio.open_connection(sock=near)
        cls.open.add(peer)
        return peer

    def send(self, **frame) -> None:
        self.send_bytes(json.dumps(frame).encode())

    def send_bytes(self, payload: bytes, opcode: int = 0x81) -> None:
        """Send a frame, masked with zeros: that is allowed, and leaves the payload as it is."""
        size = len(payload)
        if size < 126:
            head = struct.pack("!BB", opcode, 0x80 | size)
        elif size < 65_536:
            head = struct.pack("!BBH", opcode, 0xFE, size)
        else:
            head = struct.pack("!BBQ", opcode, 0xFF, size)
        self.writer.write(head + b"\0\0\0\0" + payload)

    async def receive(self) -> str:
        """Return the next text frame; raise Closed instead when the connection has ended."""
        try:
            opcode, size = await self.reader.readexactly(2)
            if size > 125:
                width = 2 if size == 126 else 8
                size = int.from_bytes(await self.reader.readexactly(width))
            payload = await self.reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError):
            raise Closed(1006) from None
        if opcode == 0x88:
            raise Closed(int.from_bytes(payload[:2]), payload[2:].decode())
        return payload.decode()

    async def read(self) -> bytes:
        """Return what has arrived, undivided and without a look at it, but inflated."""
        data = await self.reader.read(1 << 20)
        if not self.inflate:
            return data
        data, plain = self.rest + data, []
        while len(data) > 1 and len(data) >= 2 + data[1]:  # all frames are small
            plain.append(self.inflate.decompress(data[2 : 2 + data[1]] + b"\0\0\xff\xff"))
            data = data[2 + data[1] :]
        self.rest = data
        return b"".join(plain) or data and b" "

    async def read_all(self) -> None:
        """Read, and forget, until the connection ends."""
        while await self.reader.read(1 << 20):
            pass

    async def read_until(self, mark: bytes) -> None:
        """Read, and forget, until this has arrived."""
        data = b""
        while mark not in data:
            if not (more := await self.reader.read(1 << 20)):
                raise Closed(1006)
            data = data[-len(mark) :] + more

    async def flood(self, data: bytes) -> None:
        """Send the same again and again, until the connection ends."""
        while True:
            self.writer.write(data)
            await self.writer.drain()

    def stop_reading(self) -> None:
        """Read nothing any more, and let the kernel not do it instead."""
        self.writer.transport.pause_reading()
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def close(self) -> None:
        self.writer.transport.abort()
        self.open.discard(self)

    @classmethod
    async def close_all(cls) -> None:
        for peer in list(cls.open):
            peer.close()
        await asyncio.sleep(0)  # an aborted transport closes its socket in the next turn


class Entry(NamedTuple):
    """A line of the log as a member was shown it: a message, a notice, or a gap."""

    kind: str
    seq: int
    sender: str
    id: str


def entries(frame: str) -> Iterator[Entry]:
    for kind, seq, sender, id, gap, before in ENTRY.findall(frame):
        yield Entry(gap or kind, int(seq or before), sender, id)


class Member:
    """Somebody who behaves as the page does: dials again, resumes, shows every message once."""

    patience: float | None = None  # seconds without a frame until it dials again

    def __init__(self, server, code: str, name: str, address: str = "127.0.0.1"):
        self.server, self.code, self.name = server, code, name  # whatever has a port is a server
        self.address = address
        self.key, self.id, self.token = secrets.token_hex(), None, None
        self.unsent: list[str] = []  # ids, which are what is said, the oldest first
        self.entries: list[Entry] = []  # all that it was shown, also what the page would not repeat
        self.after, self.people = 0, ""
        self.dialled, self.closes = 0, Counter()
        self.task = asyncio.create_task(self.live())

    async def live(self) -> None:
        while True:
            try:
                await self.connect()
            except (Closed, OSError, TimeoutError) as end:
                self.closes[end.args or ("silent",)] += 1
            await asyncio.sleep(self.pause())

    def pause(self) -> float:
        return 0.3

    async def connect(self) -> None:
        """Dial, say hello, and read until the connection ends."""
        self.dialled, self.people = self.dialled + 1, ""
        async with asyncio.timeout(self.patience):
            self.peer = await Peer.connect(self.server.port, self.code, self.address)
        me = (
            {"token": self.token, "after": self.after}
            if self.token
            else {"name": self.name, "key": self.key}
        )
        self.peer.send(hello=me)
        talking = asyncio.create_task(self.talk())
        try:
            while not self.peer.lingers:
                async with asyncio.timeout(self.patience):
                    frame = await self.peer.receive()
                self.read(frame)
                await self.answer(frame)
        finally:
            talking.cancel()
            if not self.peer.lingers:
                self.peer.close()

    async def talk(self) -> None:
        """Send what is not confirmed, all of it again on each connection."""
        for id in self.unsent:
            self.peer.send(say=id, id=id)

    async def answer(self, frame: str) -> None:
        if 'hx-target="#beat"' in frame:
            self.peer.send(here=self.after)

    def read(self, frame: str) -> None:
        if token := re.search('data-member="([^"]+)" data-token="([^"]+)"', frame):
            self.id, self.token = token.groups()
        if after := re.search(r'data-after="(\d+)"', frame):  # older servers do not say it
            self.after = max(self.after, int(after[1]))
        if people := re.search('hx-target="#people".*?</hx-partial>', frame, re.DOTALL):
            self.people = people[0]
        if confirmed := re.search('data-id="([^"]+)" data-verdict="confirmed"', frame):
            self.unsent = [id for id in self.unsent if id != confirmed[1]]
        for entry in entries(frame):
            self.after = entry.seq
            self.entries.append(entry)
            if entry.sender == self.id and entry.id in self.unsent:
                self.unsent.remove(entry.id)

    @property
    def log(self) -> list[str]:
        """What the page would show: the ids of the messages, each once, and "gap" for a hole."""
        log = []
        for entry in self.entries:
            if entry.kind == "gap" or (entry.kind == "message" and entry.id not in log):
                log.append(entry.id or entry.kind)
        return log

    def says(self, id: str) -> None:
        self.unsent.append(id)
        with suppress(OSError):
            self.peer.send(say=id, id=id)

    def loses_connection(self) -> None:
        self.peer.close()

    async def until(self, true) -> None:
        """Wait until something is true of this member."""
        async with asyncio.timeout(20):
            while not true(self):
                assert not self.task.done(), self.task.exception()
                await asyncio.sleep(0.02)

    async def reads(self, *log: str) -> None:
        """Wait until exactly this has been shown, and nothing is unsent."""
        try:
            await self.until(lambda _: self.log == list(log) and not self.unsent)
        except TimeoutError:
            assert (self.log, self.unsent) == (list(log), [])

    async def sees(self, *names: str) -> None:
        """Wait until exactly these are shown as being here."""
        await self.until(lambda _: sorted(self.here()) == sorted(names))
        assert "(reconnecting)" not in self.people

    def here(self) -> list[str]:
        return re.findall(r'class="who">(\w+)</bdi></li>', self.people)


class Proxy:
    """A line to a server, which can be cut, and go silent; with luck, each connection breaks by itself.

    It knows nothing of WebSockets: it breaks bytes, as networks do.
    """

    FAULTS = ("reset", "finish", "black hole", "deaf", "mute", "stall")
    SILENT: ClassVar = {"black hole": {"out", "in"}, "deaf": {"in"}, "mute": {"out"}}

    def __init__(self, server, luck: random.Random | None = None):
        self.server, self.luck = server, luck  # whatever has a port is a server
        self.up, self.calm = True, not luck
        self.silent: set[str] = set()  # the directions in which nothing arrives: "out", "in"
        self.breaking = 0  # connections to which a fault is happening
        self.writers, self.faults = set(), Counter()

    async def __aenter__(self) -> Self:
        self.listener = await asyncio.start_server(self.carry, "127.0.0.1", 0)
        self.port = self.listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_) -> None:
        self.listener.close()
        self.cut(up=False)

    def cut(self, up: bool = True) -> None:
        """Cut all connections, and let new ones through only if it is up."""
        self.up = up
        for writer in self.writers:
            writer.transport.abort()

    async def carry(self, reader, writer) -> None:
        """Serve one connection until it ends, or breaks."""
        if not self.up:
            return writer.transport.abort()
        try:
            far = socket.create_connection(("127.0.0.1", self.server.port))
        except OSError:
            return writer.close()  # the server restarts
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)  # or the kernel hides a stall
        far_reader, far_writer = await asyncio.open_connection(sock=far, limit=16_384)
        ends, silent = {writer, far_writer}, set()
        manner = self.luck.choice(("plain", "plain", "sliced", "delayed")) if self.luck else "plain"
        self.writers |= ends
        pumps = [
            asyncio.create_task(self.pump(reader, far_writer, manner, silent, "out")),
            asyncio.create_task(self.pump(far_reader, writer, manner, silent, "in")),
        ]
        try:
            if not self.calm:
                await asyncio.wait(pumps, timeout=self.luck.uniform(0.05, 1.5))
            if self.calm:
                await asyncio.wait(pumps)
            else:
                self.breaking += 1
                await self.damage(pumps, silent, writer, far_writer)
                self.breaking -= 1
        finally:
            self.writers -= ends
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in ends:
                end.close()

    async def damage(self, pumps: list, silent: set[str], writer, far_writer) -> None:
        """Have one of the faults happen to a connection, which is closed when this returns."""
        fault = self.luck.choice(self.FAULTS)
        self.faults[fault] += 1
        if fault == "stall":
            far_writer.transport.pause_reading()
            await asyncio.wait(pumps, timeout=2.5)
            far_writer.transport.resume_reading()
            await asyncio.wait(pumps, timeout=1.5)
        elif fault in self.SILENT:
            silent |= self.SILENT[fault]
            await asyncio.wait(pumps, timeout=3)
        elif fault == "reset":
            for end in (writer, far_writer):
                if not end.is_closing():
                    end.get_extra_info("socket").setsockopt(*RESET)

    async def pump(self, reader, writer, manner: str, silent: set[str], direction: str) -> None:
        """Carry bytes in one direction, until it ends."""
        try:
            while data := await reader.read(65_536):
                if manner == "delayed":
                    await asyncio.sleep(self.luck.uniform(0, 0.05))
                while data and direction not in self.silent | silent:
                    size = self.luck.randint(1, 700) if manner == "sliced" else len(data)
                    writer.write(data[:size])
                    await writer.drain()
                    data = data[size:]
        finally:
            writer.close()


def progress(text: str) -> None:
    print(f"\r{text:<60}", end="", flush=True)
