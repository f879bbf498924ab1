"""Chaos and load: the proof that nothing is lost, and how much one core carries.

    python bench_chat.py                  # chaos: 500 and more broken connections, then a checker
    python bench_chat.py chaos --prove    # the checker's own test: it must find planted faults
    python bench_chat.py load             # the highest rates that a server sustains
    python bench_chat.py attack           # what attacks do to others, without guards.py and with it
    python bench_chat.py fill             # the memory of a server that is full

Chaos puts a proxy between members and a real server. It knows nothing of WebSockets: it breaks
bytes, as networks do. The words of the verdict are those of Jepsen's checkers. Exit code 1 means
that a guarantee does not hold.
"""

import argparse
import asyncio
import base64
import json
import logging
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from bisect import bisect
from collections import Counter
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import ClassVar
from urllib.request import Request, urlopen

HERE = Path(__file__).parent
logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of writing to what we broke
FREE = {  # the limits that guard against floods; the rest stays as it is
    "CHAT_MESSAGE_RATE": "1e9",
    "CHAT_MESSAGE_BURST": "1e9",
    "CHAT_FRAME_RATE": "1e9",
    "CHAT_FRAME_BURST": "1e9",
    "CHAT_MEMBERS": "2000",
    "CHAT_SOCKETS": "4000",
    "CHAT_SOCKETS_PER_ADDRESS": "4000",
    "CHAT_NEW_ROOM_BURST": "1e9",
    "CHAT_JOIN_DEADLINE": "60",
}
SABOTAGE = {  # what --prove plants, as a program to run instead of chat.py
    "": "import chat; chat.main()",
    "without dedupe": "import chat; chat.IDS_REMEMBERED = -(10**9); chat.main()",
    "without resume": "import chat; enter = chat.enter; chat.enter = lambda room, member, outbox, "
    "after: enter(room, member, outbox, room.seq if after else 0); chat.main()",
    "without gap lines": "import chat; chat.fragments.gap = lambda seq: ''; chat.main()",
}
ENTRY = re.compile(
    r'<li id="e\d+" class="(\w+)[^>]*? data-seq="(\d+)"(?: data-from="(\w+)" data-id="([\w-]+)")?'
    r'|<li class="(gap)" data-seq="(\d+)"'
)


RESET = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)  # makes close send a RST


class Closed(Exception):
    """The connection has ended; has the close code, or 1006 if there was none."""


class Server:
    """A real server on a free port of the loopback, in a process of its own."""

    def __init__(self, program=SABOTAGE[""], core=None, end=signal.SIGTERM, free=FREE, **settings):
        self.program, self.core, self.end, self.free = program, core, end, free
        self.start(**settings)

    def start(self, **settings) -> None:
        """Start it, also again after stop, with these settings instead of those before."""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - what it says on stderr, closed by stop
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.program, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=HERE,
            env=os.environ | self.free | settings,
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
        sys.stderr.write(self.complaints())
        self.log.close()


class Many:
    """Servers behind an nginx, which runs as deploy/nginx-many.conf says, on free ports."""

    SETTINGS: ClassVar = {"CHAT_SECRET": "shared", "CHAT_PROXIES": "1"}
    banner, create_room = "", Server.create_room

    def __init__(self, folder: Path, count: int = 4):
        self.servers = [Server(end=signal.SIGKILL, **self.SETTINGS) for _ in range(count)]
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


class Peer:
    """A WebSocket client with no more of RFC 6455 than is needed here."""

    open: ClassVar[set["Peer"]] = set()
    offer = "Sec-WebSocket-Extensions: permessage-deflate\r\n"  # as browsers do
    lingers: asyncio.Task | None = None
    inflate = None  # where the server compresses
    rest = b""

    @classmethod
    async def connect(cls, port: int, code: str) -> "Peer":
        peer = cls()
        near = socket.create_connection(("127.0.0.1", port))
        near.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22
        )  # or bursts meet a closed window
        peer.reader, peer.writer = await asyncio.open_connection(sock=near)
        cls.open.add(peer)
        key = base64.b64encode(os.urandom(16)).decode()
        peer.writer.write(
            f"GET /r/{code}/ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Origin: http://127.0.0.1:{port}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n{cls.offer}\r\n".encode()
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


# ── Chaos ────────────────────────────────────────────────────────────────────────────────────────


class Proxy:
    """Carries bytes between members and the server, and breaks connections in every way."""

    FAULTS = ("reset", "finish", "black hole", "deaf", "mute", "stall")

    def __init__(self, port: int, seed: int):
        self.target, self.random, self.calm, self.faults = (
            port,
            random.Random(seed),
            False,
            Counter(),
        )

    async def start(self) -> int:
        self.server = await asyncio.start_server(self.carry, "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()[1]

    async def carry(self, reader, writer) -> None:
        fault = self.random.choice(self.FAULTS)
        manner = self.random.choice(("plain", "plain", "sliced", "delayed"))
        try:
            far = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            return writer.close()  # the server restarts
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)  # or the kernel hides a stall
        far_reader, far_writer = await asyncio.open_connection(sock=far, limit=16_384)
        dead = set()  # the directions in which bytes vanish
        pumps = [
            asyncio.create_task(self.pump(reader, far_writer, manner, dead, "mute")),
            asyncio.create_task(self.pump(far_reader, writer, manner, dead, "deaf")),
        ]
        try:
            await asyncio.wait(pumps, timeout=self.random.uniform(0.05, 1.5))
            if self.calm:
                await asyncio.wait(pumps)
            self.faults[fault] += 1
            if fault == "stall":
                far_writer.transport.pause_reading()
                await asyncio.wait(pumps, timeout=2.5)
                far_writer.transport.resume_reading()
                await asyncio.wait(pumps, timeout=1.5)
            elif fault in ("black hole", "deaf", "mute"):
                dead |= {"deaf", "mute"} if fault == "black hole" else {fault}
                await asyncio.wait(pumps, timeout=3)
            elif fault == "reset":
                for end in (writer, far_writer):
                    if not end.is_closing():
                        end.get_extra_info("socket").setsockopt(*RESET)
        except asyncio.CancelledError:
            pass  # the run is over
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            writer.close()
            far_writer.close()

    async def pump(self, reader, writer, manner: str, dead: set, direction: str) -> None:
        try:
            while data := await reader.read(65_536):
                if manner == "delayed":
                    await asyncio.sleep(self.random.uniform(0, 0.05))
                while data and direction not in dead:
                    size = self.random.randint(1, 700) if manner == "sliced" else len(data)
                    writer.write(data[:size])
                    await writer.drain()
                    data = data[size:]
        finally:
            writer.close()


class Member:
    """Talks, loses its connection again and again, and writes down all that it is shown."""

    def __init__(self, port: int, code: str, name: str, luck: random.Random, messages: int):
        self.port, self.code, self.name, self.luck = port, code, name, luck
        self.unsent = [f"{name}-{number}" for number in range(messages)]  # ids, the oldest first
        self.said = []
        self.log = []  # of (seq, member id, message id) and ("gap", up to this seq)
        self.id = self.token = None
        self.after, self.reconnects, self.closes = 0, 0, Counter()

    async def live(self) -> None:
        while True:
            try:
                await self.connect()
            except (Closed, OSError, TimeoutError) as end:
                self.closes[end.args or ("silent",)] += 1
                self.reconnects += 1
            await asyncio.sleep(self.luck.uniform(0, 0.1))

    async def connect(self) -> None:
        async with asyncio.timeout(2):
            peer = await Peer.connect(self.port, self.code)
        hello = {"token": self.token, "after": self.after} if self.token else {"name": self.name}
        peer.send(hello=hello)
        talking = asyncio.create_task(self.talk(peer))  # before it knows what has arrived
        try:
            while True:
                async with asyncio.timeout(2):  # the server's heart beats faster
                    self.read(await peer.receive())
                peer.send(here=self.after)
                if self.luck.random() < 0.002:  # a dead phone, for as long as others can bear
                    await asyncio.sleep(2)
                if self.luck.random() < 0.004:
                    peer.lingers = asyncio.create_task(self.linger(peer))
                    return  # to connect again: the new connection takes over
        finally:
            talking.cancel()
            if not peer.lingers:
                peer.close()

    async def linger(self, peer: Peer) -> None:
        """Listen on a connection that another one has replaced, until the server has ended it."""
        try:
            async with asyncio.timeout(5):
                while True:
                    await peer.receive()
        except (Closed, OSError, TimeoutError) as end:
            self.closes[end.args or ("silent",)] += 1
        peer.close()

    async def talk(self, peer: Peer) -> None:
        """Send what is not confirmed, all of it again on each connection, and then the rest."""
        while not self.token:  # or what it says would belong to a member that it never becomes
            await asyncio.sleep(0.05)
        for id in list(self.unsent):
            if id not in self.said:
                self.said.append(id)
                await asyncio.sleep(self.luck.expovariate(8))
            peer.send(say=id + " bla" * self.luck.randint(0, 450), id=id)

    def read(self, frame: str) -> None:
        if token := re.search('data-member="(.+?)" data-token="(.+?)"', frame):
            self.id, self.token = token.groups()
        if confirmed := re.search('data-id="(.+?)" data-verdict="confirmed"', frame):
            self.unsent = [id for id in self.unsent if id != confirmed[1]]
        for kind, seq, sender, id, gap, before in ENTRY.findall(frame):
            self.after = int(seq or before)
            self.log.append((gap, self.after) if gap else (self.after, sender, id))
            if sender == self.id and id in self.unsent:
                self.unsent.remove(id)


def check(members: list[Member], restarts: list[int]) -> Counter:
    """Compare what the members of one room said with what they were shown.

    The restarts are times in milliseconds, which the numbers of entries come from, too. What was
    posted before one, and confirmed to nobody, may be posted again after it; and what was not yet
    with everybody is gone, but only with a line in its place.
    """
    found = Counter()
    order = {}  # seq: (member id, message id), as anybody saw it
    for member in members:
        for seq, *said in member.log:
            if seq != "gap" and order.setdefault(seq, said) != said:
                found["reordered"] += 1
    posted = [(sender, id, bisect(restarts, seq)) for seq, (sender, id) in sorted(order.items())]
    posted = [said for said in posted if said[1]]  # without notices
    found["duplicated"] += len(posted) - len(set(posted))
    known = dict.fromkeys(said[:2] for said in posted)
    found["unexpected"] += len(known.keys() - {(m.id, id) for m in members for id in m.said})
    for member in members:
        found["attempted"] += len(member.said)
        found["acknowledged"] += len([id for id in member.said if id not in member.unsent])
        mine = [id for sender, id in known if sender == member.id]
        found["lost"] += len(set(member.said) - set(mine))
        found["reordered"] += mine != [id for id in member.said if id in mine]
        shown = [entry[0] for entry in member.log if entry[0] != "gap"]
        found["duplicated"] += len(shown) - len(set(shown))
        found["reordered"] += shown != sorted(shown)
        missed, last = {seq for seq in order if seq > shown[0]} - set(shown), 0
        for seq, *said in member.log:
            if seq == "gap":
                missed -= {seq for seq in missed if last < seq <= said[0]}
                found["gaps"] += 1
            last = said[0] if seq == "gap" else seq
        found["lost"] += len(missed)
    return found


async def chaos(sabotage: str, seed: int, messages: int, breaks: int, rooms=3, size=16) -> Counter:
    """Let members talk through the proxy until all is said and enough has broken; then check.

    When a third has been said the server is killed, and after another third it is stopped.
    """
    settings = {"BEAT": "0.3", "SILENCE": "3", "OUTBOX": "8", "HISTORY": "1e9"}
    settings |= {"HISTORY_BYTES": "1e9", "TALK_BYTES": "1e12", "SECRET": "chaos"}
    settings = {f"CHAT_{name}": settings[name] for name in settings}
    server = Server(SABOTAGE[sabotage], **settings)
    proxy = Proxy(server.port, seed)
    port = await proxy.start()
    codes = [f"CHAS2{digit}" for digit in "23456789"[:rooms]]
    members = []
    for code in codes:
        server.create_room(code)
        for number in range(size):
            luck = random.Random(f"{seed} {code} {number}")
            members.append(Member(port, code, f"{code}-{number}", luck, messages))
    await asyncio.sleep(0.2)
    sockets = server.sockets()  # before: what it has open with nobody connected
    tasks = [asyncio.create_task(member.live()) for member in members]
    started, restarts, ends = time.monotonic(), [], [signal.SIGTERM, signal.SIGKILL]
    while not proxy.calm:
        await asyncio.sleep(0.5)
        unsaid = sum(len(member.unsent) for member in members)
        broken = sum(member.reconnects for member in members)
        seconds = time.monotonic() - started
        progress(f"{seconds:.0f} s, {broken} reconnects, {unsaid} messages to go")
        if unsaid < len(members) * messages * len(ends) / 3:
            server.end = ends.pop()
            await asyncio.to_thread(server.stop)
            restarts.append(time.time_ns() // 1_000_000)
            server.start(**settings)
            proxy.target = server.port
        proxy.calm = seconds > 150 or (not unsaid and broken >= breaks)
    await asyncio.sleep(6)  # longer than any fault lasts
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await Peer.close_all()
    proxy.server.close()
    await asyncio.sleep(2)
    left_over = server.sockets() - sockets
    server.stop()
    talks = ([member for member in members if member.code == code] for code in codes)
    found = sum((check(talk, restarts) for talk in talks), Counter())
    found["left over"] = left_over
    found["restarts"] = len(restarts)
    found["reconnects"] = sum(member.reconnects for member in members)
    print("\rproxy: " + ", ".join(f"{proxy.faults[fault]} {fault}" for fault in proxy.FAULTS))
    closes = sum((member.closes for member in members), Counter())
    for end, count in closes.most_common():
        print(f"{count:8} × {' '.join(map(str, end))}")
    return found


def progress(text: str) -> None:
    print(f"\r{text:<60}", end="", flush=True)


FAULTS = ("lost", "duplicated", "unexpected", "reordered", "left over")


def run_chaos(options) -> bool:
    """Print the verdict; with --prove, that of runs in which there must be faults."""
    if not options.prove:
        found = asyncio.run(chaos("", options.seed, options.messages, options.breaks))
        for word in ("attempted", "acknowledged", *FAULTS, "gaps", "restarts", "reconnects"):
            print(f"{word:>14} {found[word]}")
        return found["attempted"] == found["acknowledged"] and not any(found[f] for f in FAULTS)
    fine = True
    for sabotage, fault in zip(list(SABOTAGE)[1:], ("duplicated", "lost", "lost"), strict=True):
        found = asyncio.run(chaos(sabotage, options.seed, 40, 100))
        print(
            f"{sabotage}: {found[fault]} {fault}, which is {'right' if found[fault] else 'WRONG'}"
        )
        fine &= found[fault] > 0
    return fine


# ── Load ─────────────────────────────────────────────────────────────────────────────────────────

TUTORIAL = """
import asyncio, socket, sys
from hypercorn.asyncio import serve
from hypercorn.config import Config
from quart import Quart, websocket
app, queues = Quart("tutorial"), set()
@app.post("/r/<code>")
async def create(code): return "", 204
async def sending(queue):
    while True: await websocket.send(await queue.get())
@app.websocket("/r/<code>/ws")
async def talk(code):
    queue = asyncio.Queue()
    queues.add(queue)
    task = asyncio.create_task(sending(queue))
    try:
        while True:
            text = await websocket.receive()
            for queue in queues: queue.put_nowait(text)
    finally:
        task.cancel()
        queues.discard(queue)
listener, config = socket.create_server(("127.0.0.1", 0)), Config()
print("tutorial on http://127.0.0.1:%d" % listener.getsockname()[1], flush=True)
config.bind, config.loglevel = [f"fd://{listener.detach()}"], "WARNING"
asyncio.run(serve(app, config))
"""


STAMP = re.compile(rb"sent@(\d{15})")  # in microseconds


class Crowd:
    """Many members of one room. What arrives is counted as bytes: parsing would be the bottleneck."""

    sample = 1  # so many of the stamps that arrive together are looked at

    def __init__(self, server: Server, size: int, code="CRWD22"):
        self.server, self.size, self.code = server, size, code
        self.peers, self.readers, self.count, self.latencies, self.dropped = [], [], 0, [], 0

    async def join(self, at_once: int = 50) -> float:
        """Have all members join, so many at once; return the seconds that it took."""
        self.server.create_room(self.code)
        started, gate = time.perf_counter(), asyncio.Semaphore(at_once)
        self.peers = await asyncio.gather(
            *(self.enter(number, gate) for number in range(self.size))
        )
        return time.perf_counter() - started

    async def enter(self, number: int, gate: asyncio.Semaphore) -> Peer:
        async with gate:
            peer = await Peer.connect(self.server.port, self.code)
            peer.send(hello={"name": f"member {number}"})
            if "tutorial" not in self.server.banner:
                await peer.receive()
        self.readers.append(asyncio.create_task(self.read(peer)))
        return peer

    async def read(self, peer: Peer) -> None:
        while data := await peer.read():
            self.count += data.count(b"sent@")
            for stamp in islice(STAMP.finditer(data), self.sample):
                self.latencies.append(time.perf_counter_ns() // 1000 - int(stamp[1]))
        self.dropped += 1

    async def talk(self, rate: float, seconds: float, patience=3) -> tuple[float, float, bool]:
        """Say so many messages a second; return p50 and p99 in ms, and whether all has arrived.

        The first 1.5 seconds do not count for the times: TCP opens its windows only with traffic.
        """
        self.count, self.latencies, warm = 0, [], False
        speakers = self.peers[:20]
        started, said = time.perf_counter(), 0
        while (now := time.perf_counter() - started) < 1.5 + seconds:
            if not warm and now > 1.5:
                self.latencies, warm = [], True
            while said < now * rate:
                stamp = f"sent@{time.perf_counter_ns() // 1000:015}"
                speakers[said % len(speakers)].send(say=stamp, id=f"i{said}-{rate:.0f}")
                said += 1
            await asyncio.sleep(0.005)
        deadline = time.perf_counter() + patience
        while self.count < said * self.size and time.perf_counter() < deadline:
            await asyncio.sleep(0.02)
        self.missing = said * self.size - self.count
        times = sorted(self.latencies) or [10**9]
        p50, p99 = (times[len(times) * part // 100] / 1000 for part in (50, 99))
        return p50, p99, not self.missing and not self.dropped

    async def leave(self) -> None:
        for task in self.readers:
            task.cancel()
        await Peer.close_all()


async def highest_rate(program: str, size: int) -> int:
    """Return the highest rate (messages a second) with nothing lost and p99 under 250 ms."""
    good, bad, rate = 0, None, 10_000 / size
    while bad is None or bad > good * 1.15:
        server = Server(program, core=0, end=signal.SIGKILL)
        crowd = Crowd(server, size)
        await crowd.join()
        await asyncio.sleep(1)
        _, p99, complete = await crowd.talk(rate, 4)
        await crowd.leave()
        server.stop()
        fine = complete and p99 < 250
        progress(
            f"{size} members, {rate:.0f} messages a second: p99 {p99:.0f} ms{' ok' if fine else ''}"
        )
        if fine:
            good = rate
        else:
            bad = rate
        rate = good * 2 if bad is None else bad / 2 if not good else (good * bad) ** 0.5
        if rate < 1:
            break
    return round(good)


async def load(options) -> None:
    os.sched_setaffinity(0, {1})  # the server has core 0
    print(
        f"{'members':>8} {'chat.py':>10} {'tutorial':>10} {'deliveries':>12} {'p50, p99 at 10/s':>18}"
    )
    for size in options.sizes:
        chat, tutorial = [await highest_rate(program, size) for program in (SABOTAGE[""], TUTORIAL)]
        server = Server(core=0)
        crowd = Crowd(server, size)
        await crowd.join()
        await asyncio.sleep(1)
        p50, p99, _ = await crowd.talk(10, 10)
        await crowd.leave()
        server.stop()
        progress("")
        print(
            f"\r{size:>8} {chat:>8}/s {tutorial:>8}/s {chat * size:>10}/s {p50:>8.1f}, {p99:.1f} ms"
        )
    for at_once in (50, 1000):
        server = Server(core=0)
        empty, crowd = server.memory(), Crowd(server, 1000)
        seconds = await crowd.join(at_once)
        await asyncio.sleep(3)
        each = (server.memory() - empty) / 1000 / 1024
        print(f"1,000 join, {at_once} at a time: {seconds:.1f} s, then {each:.0f} KiB a member")
        await crowd.leave()
        server.stop()


async def many(processes: int) -> float:
    """Return how many messages a second 60 rooms of 4 carry, each with 60 on the way."""
    with tempfile.TemporaryDirectory() as folder:
        servers = Many(Path(folder), processes)
        await servers.start()
        crowds = [Crowd(servers, 4, f"MANY{room // 8 + 2}{room % 8 + 2}") for room in range(60)]
        for crowd in crowds:
            await crowd.join()

        async def talk(crowd: Crowd) -> None:
            said = 0
            while True:
                for _ in range(60):
                    crowd.peers[0].send(say=f"sent@{said:015}", id=f"i{said}")
                    said += 1
                while crowd.count < said * crowd.size:
                    await asyncio.sleep(0.001)

        talks = [asyncio.create_task(talk(crowd)) for crowd in crowds]
        await asyncio.sleep(2)
        before, started = sum(crowd.count for crowd in crowds), time.perf_counter()
        await asyncio.sleep(5)
        after, seconds = sum(crowd.count for crowd in crowds), time.perf_counter() - started
        for talk in talks:
            talk.cancel()
        for crowd in crowds:
            await crowd.leave()
        servers.stop()
    return (after - before) / 4 / seconds


def run_many(options) -> bool:
    """Print how the throughput of small rooms grows with the processes that nginx spreads them over."""
    os.environ["PATH"] += ":/usr/sbin"  # where Debian has nginx
    for processes in (1, 2, 4):
        rates = sorted(asyncio.run(many(processes)) for _ in range(3))
        print(
            f"{processes} processes: {rates[1]:.0f} messages/s ({rates[0]:.0f} to {rates[2]:.0f})"
        )
    return True


def run_load(options) -> bool:
    asyncio.run(load(options))
    return True


# ── Attacks ──────────────────────────────────────────────────────────────────────────────────────

BUSY = """
import asyncio, chat, guards
@chat.app.websocket("/r/BUSY22/ws")
async def busy():
    await chat.websocket.accept()
    await asyncio.sleep(60)
"""
DEFAULT = """
guards.install = lambda app, *_, **__: app.after_request(guards.headers)
guards.harden = lambda *_, **__: None
chat.stacked = lambda text: False
chat.app.logger.manager.disable = 50  # it complains a lot
"""
LARGEST = "http://" + "&" * 1993  # as HTML 20,000 characters, of 4 bytes each for an Astral name


async def bomb(port: int, number: int) -> None:
    peer = await Peer.connect(port, "PARTY2")
    zeros, squeeze = bytes(1 << 20), zlib.compressobj(9, zlib.DEFLATED, -15)
    payload = b"".join(squeeze.compress(zeros) for _ in range(256)) + squeeze.flush(
        zlib.Z_SYNC_FLUSH
    )
    peer.send_bytes(payload[:-4], 0xC1 if peer.inflate else 0x81)
    await peer.read_all()


async def too_large(port: int, number: int) -> None:
    peer = await Peer.connect(port, "PARTY2")
    peer.writer.write(struct.pack("!BBQI", 0x81, 0xFF, 1 << 40, 0))
    await peer.flood(bytes(65_536))


async def pings(port: int, number: int) -> None:
    await (await Peer.connect(port, "PARTY2")).flood(b"\x89\x80\0\0\0\0" * 10_000)


async def fragments(port: int, number: int) -> None:
    peer = await Peer.connect(port, "PARTY2")
    peer.send_bytes(b"", 0x01)
    await peer.flood(b"\x00\x81\0\0\0\0x" * 10_000)


async def tiny_frames(port: int, number: int) -> None:
    peer = await Peer.connect(port, "PARTY2")
    peer.send(hello={"name": f"flood {number}"})
    await peer.flood(b'\x81\x8a\0\0\0\0{"here":1}' * 5_000)


async def marks(port: int, number: int) -> None:
    """Say letters with thousands of marks, which it takes long to put into order."""
    peer = await Peer.connect(port, "PARTY2")
    peer.send(hello={"name": f"marks {number}"})
    letter = json.dumps({"say": "a" + "\u0301" * 4_000 + "\u0316" * 4_000, "id": "x"})
    for _ in range(70):
        peer.send_bytes(letter.encode().decode("unicode_escape").encode())
        await asyncio.sleep(0.1)
    await peer.read_all()


async def slow_reader(port: int, number: int) -> None:
    """Be one of many who never read, while one in twenty says the largest messages there can be."""
    peer = await Peer.connect(port, "PARTY2")
    peer.send(hello={"name": f"\U0001f40c {number}"})
    if number % 20:
        peer.stop_reading()
        await asyncio.sleep(60)
    reading = asyncio.create_task(peer.read_all())
    for message in range(100):
        peer.send(say=LARGEST, id=f"m{message}")
        await asyncio.sleep(0.55)
    await reading


async def busy_handler(port: int, number: int) -> None:
    peer = await Peer.connect(port, "BUSY22")
    await peer.flood((struct.pack("!BBHI", 0x81, 0xFE, 16_000, 0) + b"x" * 16_000) * 10)


async def large_frames(port: int, number: int) -> None:
    """Send frames as large as they may be, then do not read what becomes of it."""
    peer = await Peer.connect(port, "PARTY2")
    peer.send(hello={"name": f"flood {number}"})
    peer.stop_reading()
    await peer.flood(struct.pack("!BBHI", 0x81, 0xFE, 16_384, 0) + b'{"here":1}'.ljust(16_384))


async def half_open(port: int, number: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write((b"", b"GET / HTTP/1.1\r\nHost: ", b"POST /r/PARTY2 HTTP/1.1\r\n")[number % 3])
    Peer.open.add(peer := Peer())
    peer.reader, peer.writer = reader, writer
    await peer.read_all()


async def storm(port: int, number: int) -> None:
    peer = await Peer.connect(port, "PARTY2")
    peer.send(hello={"name": f"storm {number}"})
    await peer.receive()
    peer.writer.get_extra_info("socket").setsockopt(*RESET)


ATTACKS = {  # by so many at once, each again and again
    "deflate bomb": (20, bomb),
    "flood after 1009": (5, too_large),
    "empty pings": (5, pings),
    "1-byte fragments": (5, fragments),
    "tiny frames": (5, tiny_frames),
    "large frames": (5, large_frames),
    "many marks": (5, marks),
    "slow readers": (100, slow_reader),
    "busy handler": (5, busy_handler),
    "half-open": (500, half_open),
    "reconnect storm": (50, storm),
}


def strike(name: str, port: int, seconds: float) -> None:
    """Attack a server, in a process of its own, so that the others' clients are not slowed down."""
    count, attack = ATTACKS[name]
    Peer.offer = Peer.offer if attack is bomb else ""

    async def attacker(number: int) -> None:
        while True:
            try:
                await attack(port, number)
            except (Closed, OSError, asyncio.IncompleteReadError):
                pass
            await asyncio.sleep(0.01)

    async def attackers() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
                for number in range(count):
                    group.create_task(attacker(number))

    os.nice(5)  # they share a core with those who measure
    asyncio.run(attackers())


async def withstand(name: str, program: str, seconds: float) -> tuple[float, float, int, float]:
    """Attack a server while others talk; return their median and worst latency (ms), how many of
    them were disconnected, and how much the server grew (MB)."""
    server = Server(BUSY + program + "chat.main()", core=0, end=signal.SIGKILL, free={})
    pairs = [Crowd(server, 2, code) for code in ("PARTY2", "PARTY3")]
    for pair in pairs:
        pair.sample = None  # all that there are
        await pair.join()
    talks = [asyncio.create_task(pair.talk(3, seconds + 1, patience=15)) for pair in pairs]
    await asyncio.sleep(1.5)
    server.peak()
    before = server.memory()
    code = f"import bench_chat; bench_chat.strike({name!r}, {server.port}, {seconds})"
    attackers = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=HERE)
    for talk in talks:
        await talk
    await attackers.wait()
    grown = server.peak() - before
    for pair in pairs:
        pair.latencies += [20_000_000] * pair.missing
    latencies = sorted(pairs[0].latencies + pairs[1].latencies)
    gone = sum(pair.dropped for pair in pairs)
    for pair in pairs:
        await pair.leave()
    server.stop()
    return latencies[len(latencies) // 2] / 1000, latencies[-1] / 1000, gone, grown / 1e6


def run_attack(options) -> bool:
    """Print what each attack does to the default stack, and with the guards; True if they hold."""
    Peer.offer = ""  # or it would have to inflate
    os.sched_setaffinity(0, {1})  # the server has core 0
    print(f"{'':22}{'default stack':^34}{'with guards.py':^34}")
    print(f"{'attack':22}" + f"{'median':>8}{'worst ms':>10}{'gone':>6}{'MB':>8}  " * 2)
    fine = True
    for name in options.only or ATTACKS:
        print(f"{ATTACKS[name][0]:3} × {name:16}", end="", flush=True)
        for program in (DEFAULT, ""):
            median, worst, gone, grown = asyncio.run(withstand(name, program, options.seconds))
            print(f"{median:8.1f}{worst:10.1f}{gone:6}{grown:+8.1f}  ", end="", flush=True)
        held = median < 50 and not gone and grown < 20
        print("" if held else "FAILED")
        fine &= held
    return fine


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────

WIDE = 4  # bytes that a str takes for each of its characters, if only one of them is Astral
LARGEST_ENTRY = 20_600  # characters of the largest entry, see LARGEST
HEAD = 130  # bytes of an entry beside its text: tuple, number
ID = 127  # bytes of the id of a message: its hash, and a place in a dict


def worst_case(rooms: int, sockets: int) -> dict[str, float]:
    """Compute from the limits what a server can come to hold, part by part, in MB."""
    import chat  # here only: all other commands know it through its sockets

    limits, ids = chat.limits, chat.IDS_REMEMBERED
    talk = min(limits["TALK_BYTES"], rooms * limits["HISTORY_BYTES"])
    frame = max(chat.FRAME_SIZE, LARGEST_ENTRY)
    parts = {
        "connections": sockets * 48 * 1024,
        "ids": (rooms * ids + 2 * sockets * 64) * ID,
        "histories": talk + rooms * limits["HISTORY"] * HEAD,
        "in flight": sockets / 2 * frame * (WIDE + 2),  # a str, the frame, the transport's copy
        "outboxes": 2 * talk + rooms * LARGEST_ENTRY * WIDE,  # shared by the members of a room
    }
    return {name: size / 1e6 for name, size in parts.items()}


async def fill(options) -> None:
    """Fill a server to its caps with rooms of one who talks and one who never reads, and compare."""
    rooms, gate = options.rooms, asyncio.Semaphore(20)
    settings = {"CHAT_ROOMS": str(rooms), "CHAT_SOCKETS": str(2 * rooms)}
    settings |= {"CHAT_SILENCE": "1e6", "CHAT_BEAT": "1e6"}  # all but one are silent at a time
    server = Server(end=signal.SIGKILL, **settings)
    measured = {"program": server.peak() / 1e6}
    speakers, deaf, codes = [], [], []

    def note(part: str) -> None:
        measured[part] = server.peak() / 1e6 - sum(measured.values())
        progress(f"{part}: {measured[part]:.0f} MB")

    async def enter(code: str, name: str) -> Peer:
        async with gate:
            peer = await Peer.connect(server.port, code)
            peer.send(hello={"name": name})
            await peer.read_until(b"joined")
        return peer

    async def listen(code: str) -> None:
        async with gate:
            deaf.append(peer := await Peer.connect(server.port, code))
            peer.stop_reading()
            peer.send(hello={"name": "deaf"})

    async def say(peer: Peer, text: str, stage: str, count: int) -> None:
        async with gate:
            for number in range(count):
                peer.send(say=text, id=f"{stage}{number:05}".ljust(64, "x"))
                if text == LARGEST or number == count - 1:  # no faster than members may
                    await peer.read_until(f'data-id="{stage}{number:05}'.encode())

    for number in range(rooms):
        digits = (number // 29**power % 29 for power in (3, 2, 1, 0))
        codes.append("FX" + "".join("23456789ABCDEFGHJKMNPQRSTUVWXYZ"[digit] for digit in digits))
        server.create_room(codes[-1])
    speakers = await asyncio.gather(*(enter(code, "\U0001f40c") for code in codes))
    note("speakers")
    worst = worst_case(rooms, 2 * rooms)
    for stage, text, count in (("i", "x", options.ids), ("h", "x" * 250, 16)):
        await asyncio.gather(*(say(peer, text, stage, count) for peer in speakers))
        note({"i": "ids", "h": "histories"}[stage])
    await asyncio.gather(*(listen(code) for code in codes))
    await asyncio.sleep(1)
    note("in flight")
    await asyncio.gather(*(say(peer, LARGEST, "o", options.batches) for peer in speakers))
    note("outboxes")
    measured["connections"] = measured.pop("speakers")
    print(f"\r{'':20}{'computed':>10}{'measured':>10} MB")
    for part in ("program", *worst):
        print(f"{part:20}{worst.get(part, measured['program']):10.0f}{measured[part]:10.0f}")
    total = sum(worst.values()) + measured["program"]
    print(f"{'in all':20}{total:10.0f}{sum(measured.values()):10.0f}")
    await Peer.close_all()
    server.stop()


def run_fill(options) -> bool:
    Peer.offer = ""
    asyncio.run(fill(options))
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Chaos and load for chat.py.")
    commands = parser.add_subparsers()
    parser.set_defaults(run=run_chaos, seed=1, prove=False, messages=200, breaks=500)
    command = commands.add_parser("chaos", help="break connections, and check what arrived")
    command.add_argument("--seed", type=int, default=1)
    command.add_argument("--prove", action="store_true", help="plant faults, which must be found")
    command = commands.add_parser("load", help="measure what one core carries")
    command.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000])
    command.set_defaults(run=run_load)
    command = commands.add_parser("many", help="measure many processes behind nginx")
    command.set_defaults(run=run_many)
    command = commands.add_parser("attack", help="measure what attacks do to others")
    command.add_argument("--seconds", type=float, default=6)
    command.add_argument("--only", nargs="+", choices=ATTACKS)
    command.set_defaults(run=run_attack)
    command = commands.add_parser("fill", help="fill a server to its caps")
    command.add_argument("--rooms", type=int, default=1_000)
    command.add_argument("--ids", type=int, default=256)
    command.add_argument("--batches", type=int, default=10)
    command.set_defaults(run=run_fill)
    options = parser.parse_args()
    sys.exit(not options.run(options))
