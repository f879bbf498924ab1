"""Measure how much one core carries.

    python -m bench.load                                 # all cases
    python -m bench.load --only house pairs              # some of them
    python -m bench.load --against ../before tutorial    # and other servers, in alternation

    10, 100, 1000    one room of so many: the highest rate with nothing lost and p99 under 250 ms
    100@10000, 1000@2000    one room of so many, and so many messages a second
    house            500 rooms of 20 members, 500 messages a second in all
    pairs            100 rooms of two who answer each other at once
    joins            1,000 who join one room

The tutorial is the broker of Quart's tutorial: it sends a frame for every message and member, and has
nothing but the room. Server and load have a core each. Of several rounds the median is printed, and the
least and the most.
"""

import argparse
import asyncio
import gc
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count, islice
from pathlib import Path
from statistics import median

from bench.peer import FREE, HERE, SABOTAGE, Peer, Server, progress

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
ROOMY = FREE | {"CHAT_SOCKETS": "20000", "CHAT_SOCKETS_PER_ADDRESS": "20000"}
WARM = 1.5  # seconds that do not count for the times: TCP opens its windows only with traffic
STAMP = re.compile(rb"sent@(\d{15})")  # in microseconds
ids = count()


async def speak(peers: list[Peer], rate: float, seconds: float) -> int:
    """Have them say so many messages a second, in turn; return how many that were."""
    started, said = time.perf_counter(), 0
    while (now := time.perf_counter() - started) < seconds:
        while said < now * rate:
            stamp = f"sent@{time.perf_counter_ns() // 1000:015}"
            peers[said % len(peers)].send(say=stamp, id=f"i{next(ids)}")
            said += 1
        await asyncio.sleep(0.005)
    return said


def p50_and_p99(latencies: list[int]) -> tuple[float, float]:
    """Return these parts of times in microseconds, in milliseconds."""
    times = sorted(latencies) or [10**9]
    return times[len(times) // 2] / 1000, times[len(times) * 99 // 100] / 1000


class Crowd:
    """Many members of one room. What arrives is counted as bytes: parsing would be the bottleneck."""

    sample = 1  # so many of the stamps that arrive together are looked at

    def __init__(self, server: Server, size: int, code="CRWD22", address="127.0.0.1"):
        self.server, self.size, self.code, self.address = server, size, code, address
        self.peers, self.readers, self.count, self.latencies, self.dropped = [], [], 0, [], 0

    async def join(self, at_once: int = 50, read: bool = True) -> float:
        """Have all members join, so many at once, and read; return the seconds that it took."""
        self.server.create_room(self.code)
        started, gate = time.perf_counter(), asyncio.Semaphore(at_once)
        self.peers = await asyncio.gather(
            *(self.enter(number, gate) for number in range(self.size))
        )
        if read:
            self.readers = [asyncio.create_task(self.read(peer)) for peer in self.peers]
        return time.perf_counter() - started

    async def enter(self, number: int, gate: asyncio.Semaphore) -> Peer:
        async with gate:
            peer = await Peer.connect(self.server.port, self.code, self.address)
            peer.send(hello={"name": f"member {number}"})
            if "tutorial" not in self.server.banner:
                await peer.receive()
        return peer

    async def read(self, peer: Peer) -> None:
        while data := await peer.read():
            if b'"#beat"' in data:
                peer.send(here=0)
            self.count += data.count(b"sent@")
            for stamp in islice(STAMP.finditer(data), self.sample):
                self.latencies.append(time.perf_counter_ns() // 1000 - int(stamp[1]))
        self.dropped += 1

    async def talk(self, rate: float, seconds: float, patience=3) -> tuple[float, float, bool]:
        """Say so many messages a second; return p50 and p99 in ms, and whether all has arrived."""
        self.count = 0
        said = await speak(self.peers[:20], rate, WARM)
        self.latencies = []
        said += await speak(self.peers[:20], rate, seconds)
        deadline = time.perf_counter() + patience
        while self.count < said * self.size and time.perf_counter() < deadline:
            await asyncio.sleep(0.02)
        self.missing = said * self.size - self.count
        return *p50_and_p99(self.latencies), not self.missing and not self.dropped

    def times(self) -> list[int]:
        """Return how long the messages took, in microseconds: 20 s for each that did not arrive."""
        return self.latencies + [20_000_000] * self.missing

    async def leave(self) -> None:
        for task in self.readers:
            task.cancel()
        await Peer.close_all()


# ── Cases ── each measures one server once, and returns figures by their units ───────────────────


def start(server: str) -> Server:
    """Start a server: the tutorial's, or the chat.py in a folder."""
    if server == "tutorial":
        return Server(TUTORIAL, core=0, end=signal.SIGKILL)
    return Server(SABOTAGE[""], 0, signal.SIGKILL, ROOMY, Path(server))


async def talk(size: int, rate: float, seconds: float, server: str) -> tuple[float, float, Crowd]:
    """Have one room say so many messages a second; return p50 and p99 in ms, and the room."""
    running = start(server)
    crowd = Crowd(running, size)
    await crowd.join()
    await asyncio.sleep(1)
    p50, p99, _ = await crowd.talk(rate, seconds)
    await crowd.leave()
    running.stop()
    return p50, p99, crowd


async def one_room(size: int, server: str) -> dict[str, float]:
    rate = await highest_rate(size, server)
    p50, p99, _ = await talk(size, min(10, max(1, rate)), 10, server)
    return {"messages/s": rate, "deliveries/s": rate * size, "p50 ms at 10/s": p50, "p99 ms": p99}


async def highest_rate(size: int, server: str) -> float:
    """Return the highest rate (messages a second) with nothing lost and p99 under 250 ms."""
    good, bad, rate = 0, None, 10_000 / size
    while rate >= 1 and (bad is None or bad > good * 1.15):
        _, p99, crowd = await talk(size, rate, 4, server)
        fine = p99 < 250 and not crowd.missing and not crowd.dropped
        progress(f"{size} members, {rate:.0f}/s: p99 {p99:.0f} ms{' ok' if fine else ''}")
        good, bad = (rate, bad) if fine else (good, rate)
        rate = good * 2 if bad is None else bad / 2 if not good else (good * bad) ** 0.5
    return good


async def at_rate(size: int, rate: float, server: str) -> dict[str, float]:
    p50, p99, crowd = await talk(size, rate, 8, server)
    return {"p50 ms": p50, "p99 ms": p99, "missing": crowd.missing}


async def house(server: str) -> dict[str, float]:
    running = start(server)
    crowds = [Crowd(running, 20, code) for code in codes(500)]
    for crowd in crowds:
        await crowd.join()
    await asyncio.sleep(22)  # for a heartbeat, and for Python's garbage collector, see README.md
    speakers = [crowd.peers[number] for number in range(20) for crowd in crowds]
    await speak(speakers, 500, WARM)
    for crowd in crowds:
        crowd.latencies.clear()
    busy, started = running.busy(), time.perf_counter()
    await speak(speakers, 500, 10)
    share = (running.busy() - busy) / (time.perf_counter() - started)
    await asyncio.sleep(1)
    p50, p99 = p50_and_p99([time for crowd in crowds for time in crowd.latencies])
    for crowd in crowds:
        await crowd.leave()
    running.stop()
    return {"p50 ms": p50, "p99 ms": p99, "% of a core": 100 * share}


async def pairs(server: str) -> dict[str, float]:
    running, said = start(server), [0]
    crowds = [Crowd(running, 2, code) for code in codes(100)]
    for crowd in crowds:
        await crowd.join(read=False)
    for crowd in crowds:  # when all are there, or those who talk would slow down those who come
        ping, pong = crowd.peers
        crowd.readers = [
            asyncio.create_task(answer(ping, b"pong@", "ping@", said)),
            asyncio.create_task(answer(pong, b"ping@", "pong@", said)),
        ]
        ping.send(say="ping@", id=f"i{next(ids)}")
    await asyncio.sleep(WARM)
    before, started = said[0], time.perf_counter()
    await asyncio.sleep(8)
    rate = (said[0] - before) / (time.perf_counter() - started)
    for crowd in crowds:
        await crowd.leave()
    running.stop()
    return {"messages/s": rate}


async def answer(peer: Peer, hears: bytes, says: str, said: list[int]) -> None:
    """Say something whenever the other one of a pair has, and count it."""
    while data := await peer.read():
        for _ in range(data.count(hears)):
            said[0] += 1
            peer.send(say=says, id=f"i{next(ids)}")


async def joins(server: str) -> dict[str, float]:
    figures = {}
    for at_once in (50, 1_000):
        running = start(server)
        empty, crowd = running.memory(), Crowd(running, 1_000)
        figures[f"s, {at_once} at a time"] = await crowd.join(at_once)
        await asyncio.sleep(3)
        figures["KiB a member"] = (running.memory() - empty) / 1_000 / 1_024
        await crowd.leave()
        running.stop()
    return figures


def codes(many: int) -> list[str]:
    """Return so many room codes."""
    digits = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"
    return [f"HSE{digits[n // 961]}{digits[n // 31 % 31]}{digits[n % 31]}" for n in range(many)]


CASES: dict[str, Callable[[str], Awaitable[dict[str, float]]]] = {
    "10": partial(one_room, 10),
    "100": partial(one_room, 100),
    "1000": partial(one_room, 1_000),
    "100@10000": partial(at_rate, 100, 10_000),
    "1000@2000": partial(at_rate, 1_000, 2_000),
    "house": house,
    "pairs": pairs,
    "joins": joins,
}


def compare(case: str, servers: list[str], rounds: int) -> None:
    """Measure servers in alternation, so that what else the machine does hits all of them."""
    measured = {server: [] for server in servers}
    for _ in range(rounds):
        for server in servers:
            gc.collect()
            measured[server].append(asyncio.run(CASES[case](server)))
    progress("")
    print("\r", end="")
    for server in servers:
        name = "this" if server == str(HERE) else Path(server).name
        figures = []
        for unit in measured[server][0]:
            values = [figure[unit] for figure in measured[server]]
            spread = f" ({min(values):.4g} to {max(values):.4g})" if rounds > 1 else ""
            figures.append(f"{median(values):.5g}{spread} {unit}")
        print(f"{case:10}{name:10}{', '.join(figures)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--against", nargs="+", default=[], help="folders of other ones, or the word tutorial"
    )
    options = parser.parse_args()
    os.sched_setaffinity(0, {1})  # the server has core 0
    gc.disable()  # or the stops of this process would be measured as the server's
    for case in options.only:
        others = options.against if case[0].isdigit() else [*{*options.against} - {"tutorial"}]
        compare(case, [str(HERE), *others], options.rounds)


if __name__ == "__main__":
    main()
