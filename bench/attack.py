"""Attack a server while others talk, and measure what they feel of it.

    python -m bench.attack                               # every attack, on this chat.py
    python -m bench.attack --only "GET /" "QR codes"     # some of them
    python -m bench.attack --against default ../before   # also on other ones, for comparison

Meanwhile four members talk in pairs, and their messages are timed; one loses its connection and comes
back, one enters a room as a newcomer, one creates a room: they are counted as locked out if they
cannot; and a room has a history of 180 messages, of which none may be lost. `default` is this chat.py
without the seat belts of guards.py: the default stack. Exit code 1 means that an attack hurt somebody.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.attackers import ATTACKS, THEIRS, Attack, some_code
from bench.load import Crowd
from bench.peer import BUSY, HERE, Closed, Member, Peer, Server, fetch

MEDIAN, WORST = 50, 1_000  # ms that a message of the others may take
GROWTH = 150  # MB that the server may grow
MESSAGES = 180  # in the history of KEEP22
PATIENCE = 10  # seconds until somebody who does not get in is locked out
DEFAULT = """
guards.install = lambda *_, **__: None
guards.harden = lambda *_, **__: None
chat.stacked = lambda text: False  # of before
guards.STACKED = guards.re.compile("(?!)")  # which nothing matches
chat.app.logger.manager.disable = 50  # it complains a lot
"""


@dataclass
class Harm:
    """What an attack did to the others."""

    median: float  # ms
    worst: float  # ms
    gone: int  # of four who talk
    growth: float  # MB
    locked_out: int  # of those who came meanwhile
    forgotten: int  # messages of a history

    def __str__(self) -> str:
        return (
            f"{self.median:8.1f}{self.worst:10.1f}{self.gone:6}{self.growth:+9.1f}"
            f"{self.locked_out:12}{self.forgotten:11}"
        )

    def held(self) -> bool:
        fine = self.median < MEDIAN and self.worst < WORST and self.growth <= GROWTH
        return fine and not (self.gone or self.locked_out or self.forgotten)


class Others:
    """Those who are there, or come, while a server is attacked."""

    def __init__(self, server: Server, newcomer: str):
        self.server, self.newcomer = server, newcomer
        self.pairs = [
            Crowd(server, 2, "PARTY2", "127.0.0.2"),
            Crowd(server, 2, "PARTY3", "127.0.0.3"),
        ]
        self.speakers = Crowd(server, MESSAGES // 10, "KEEP22", "127.0.0.4")
        self.forgotten = 0

    async def settle(self) -> None:
        for crowd in (*self.pairs, self.speakers):
            crowd.sample = None  # all times that there are
            await crowd.join()
        for number in range(MESSAGES):  # ten of each, as many at once as a member may
            speaker = self.speakers.peers[number % self.speakers.size]
            speaker.send(say=f"sent@{number:015}", id=f"i{number}")
        async with asyncio.timeout(PATIENCE):
            while self.speakers.count < MESSAGES * self.speakers.size:
                await asyncio.sleep(0.01)
        self.resumer = Member(self.server, "KEEP22", "Resumer", "127.0.0.5")
        await self.resumer.until(lambda member: member.people)

    async def come(self) -> int:
        """Try to get in, in every way; return in how many somebody was locked out."""
        ways = (self.come_back(), self.enter(), self.create())
        return sum(await asyncio.gather(*map(self.fails, ways)))

    async def fails(self, way: Awaitable[None]) -> bool:
        try:
            async with asyncio.timeout(PATIENCE):
                await way
        except (TimeoutError, Closed, OSError, AssertionError):
            return True
        return False

    async def come_back(self) -> None:
        dialled = self.resumer.dialled
        self.resumer.loses_connection()
        await self.resumer.until(lambda member: member.dialled > dialled and member.people)

    async def enter(self) -> None:
        """Come with the right code, and count what is in the history."""
        status, _ = await fetch(self.server.port, "/r/KEEP22", address=self.newcomer)
        assert status == 200, status
        member = Member(self.server, "KEEP22", "Newcomer", self.newcomer)
        try:
            await member.until(lambda member: member.people)
            self.forgotten = MESSAGES - len(member.log)
        finally:
            member.task.cancel()

    async def create(self) -> None:
        path = f"/r/{some_code('NEW')}"
        for method in ("POST", "GET"):
            status, _ = await fetch(self.server.port, path, method, "127.0.0.6")
            assert status in (200, 303), status

    async def part(self) -> None:
        self.resumer.task.cancel()
        for crowd in (*self.pairs, self.speakers):
            await crowd.leave()


async def withstand(name: str, attack: Attack, server: Server, seconds: float) -> Harm:
    """Attack a server while others talk; return what that did to them."""
    for code in THEIRS:
        server.create_room(code)
    others = Others(server, attack.newcomer)
    await others.settle()
    talks = [asyncio.create_task(pair.talk(3, seconds + 1, PATIENCE)) for pair in others.pairs]
    await asyncio.sleep(1.5)
    server.peak()
    before = server.memory()
    program = f"from bench.attackers import strike; strike({name!r}, {server.port}, {seconds})"
    attackers = await asyncio.create_subprocess_exec(sys.executable, "-c", program, cwd=HERE)
    await asyncio.sleep(0.7 * seconds)
    locked_out = await others.come()
    await asyncio.gather(*talks)
    await attackers.wait()
    growth = server.peak() - before
    latencies = sorted(time for pair in others.pairs for time in pair.times())
    gone = sum(pair.dropped for pair in others.pairs)
    await others.part()
    return Harm(
        latencies[len(latencies) // 2] / 1000,
        latencies[-1] / 1000,
        gone,
        growth / 1e6,
        locked_out,
        others.forgotten,
    )


def print_heading() -> None:
    print(
        f"{'attack':30}{'server':10}{'median':>8}{'worst ms':>10}{'gone':>6}{'MB':>9}"
        f"{'locked out':>12}{'forgotten':>11}"
    )


def try_out(name: str, against: str, seconds: float) -> bool:
    """Print what an attack does to a server; return whether that is little enough."""
    attack, default = ATTACKS[name], against == "default"
    proxies = str(int(":" in attack.addresses[0]))  # a proxy tells them those addresses
    server = Server(
        BUSY + DEFAULT * default + "chat.main()",
        core=0,
        end=signal.SIGKILL,
        free={},
        folder=HERE if default else Path(against),
        CHAT_PROXIES=proxies,
    )
    label = "this" if Path(against) == HERE else Path(against).name
    print(f"{attack.count:5} × {name:22}{label:10}", end="", flush=True)
    try:
        harm = asyncio.run(withstand(name, attack, server, seconds))
    except (TimeoutError, Closed, OSError) as why:
        print(f"  not even begun: {why!r}  FAILED")
        return False
    finally:
        server.stop()
    print(harm, "" if harm.held() else "  FAILED", flush=True)
    return harm.held()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10, help="that each attack lasts")
    parser.add_argument("--only", nargs="+", choices=ATTACKS, metavar="NAME", default=[*ATTACKS])
    parser.add_argument(
        "--against", nargs="+", default=[], help="folders of other ones, or the word default"
    )
    options = parser.parse_args()
    Peer.offer = ""  # or it would have to inflate
    with suppress(OSError):  # where there is only one core, they share it
        os.sched_setaffinity(0, {1})  # the server has core 0
    print_heading()
    fine = True
    for name in options.only:
        for against in options.against:
            try_out(name, against, options.seconds)
        fine &= try_out(name, str(HERE), options.seconds)
    sys.exit(not fine)


if __name__ == "__main__":
    main()
