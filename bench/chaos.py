"""Break connections again and again, and check that nothing is lost, doubled or out of order.

    python -m bench.chaos            # 500 and more broken connections, two restarts, then a checker
    python -m bench.chaos --prove    # the checker's own test: it must find planted faults

A proxy stands between members and a real server, and breaks every connection. The words of the verdict are those of Jepsen's checkers. Exit code 1 means that a guarantee does
not hold.
"""

import argparse
import asyncio
import random
import signal
import sys
import time
from bisect import bisect
from collections import Counter
from contextlib import suppress

from bench.peer import CHAOS, FREE, SABOTAGE, Closed, Member, Peer, Proxy, Server, progress

FAULTS = ("lost", "duplicated", "unexpected", "reordered", "left over")


class Restless(Member):
    """A member with bad luck: it talks, stops answering, and takes itself over."""

    patience = 2  # the server's heart beats faster

    def __init__(self, server, code: str, name: str, luck: random.Random, messages: int):
        self.luck, self.said = luck, []
        super().__init__(server, code, name)
        self.unsent = [f"{name}-{number}" for number in range(messages)]

    def pause(self) -> float:
        return self.luck.uniform(0, 0.1)

    async def answer(self, frame: str) -> None:
        await super().answer(frame)
        if self.luck.random() < 0.002:  # a dead phone, for as long as others can bear
            await asyncio.sleep(2)
        if self.luck.random() < 0.004:  # to connect again: the new connection takes over
            self.peer.lingers = asyncio.create_task(self.linger(self.peer))

    async def linger(self, peer: Peer) -> None:
        """Listen on a connection that another one has replaced, until the server has ended it."""
        try:
            async with asyncio.timeout(5):
                while True:
                    await peer.receive()
        except (Closed, OSError, TimeoutError) as end:
            self.closes[end.args or ("silent",)] += 1
        peer.close()

    async def talk(self) -> None:
        """Send what is not confirmed, all of it again on each connection, and then the rest."""
        peer = self.peer
        while not self.token:  # or what it says would belong to a member that it never becomes
            await asyncio.sleep(0.05)
        for id in list(self.unsent):
            if id not in self.said:
                self.said.append(id)
                await asyncio.sleep(self.luck.expovariate(8))
            peer.send(say=id + " bla" * self.luck.randint(0, 450), id=id)


def check(members: list[Restless], restarts: list[int]) -> Counter:
    """Compare what the members of one room said with what they were shown.

    The restarts are times in milliseconds, which the numbers of entries come from, too. What was
    posted before one, and confirmed to nobody, may be posted again after it; and what was not yet
    with everybody is gone, but only with a line in its place.
    """
    found = Counter()
    order = {}  # seq: (member id, message id), as anybody saw it
    for member in members:
        for kind, seq, *said in member.entries:
            if kind != "gap" and order.setdefault(seq, said) != said:
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
        shown = [entry.seq for entry in member.entries if entry.kind != "gap"]
        found["duplicated"] += len(shown) - len(set(shown))
        found["reordered"] += shown != sorted(shown)
        missed, last = {seq for seq in order if seq > shown[0]} - set(shown), 0
        for entry in member.entries:
            if entry.kind == "gap":
                missed -= {seq for seq in missed if last < seq <= entry.seq}
                found["gaps"] += 1
            last = entry.seq
        found["lost"] += len(missed)
    return found


def progress_of(members: list[Restless], started: float) -> tuple[float, int, int]:
    """Show, and return, the seconds, how often the members came back, and what is still unsaid."""
    seconds = time.monotonic() - started
    unsaid = sum(len(member.unsent) for member in members)
    reconnects = sum(member.dialled - 1 for member in members)
    progress(f"{seconds:.0f} s, {reconnects} reconnects, {unsaid} messages to go")
    return seconds, reconnects, unsaid


async def break_and_restart(server: Server, proxy: Proxy, members: list, breaks: int) -> list[int]:
    """Wait until all is said and enough has broken; return when the server was restarted.

    When a third has been said it is killed, and after another third it is stopped.
    """
    started, restarts, ends = time.monotonic(), [], [signal.SIGTERM, signal.SIGKILL]
    most = sum(len(member.unsent) for member in members)
    while not proxy.calm:
        await asyncio.sleep(0.5)
        seconds, reconnects, unsaid = progress_of(members, started)
        if unsaid < most * len(ends) / 3:
            server.end = ends.pop()
            await asyncio.to_thread(server.stop)
            restarts.append(time.time_ns() // 1_000_000)
            server.start()
        proxy.calm = seconds > 150 or (not unsaid and reconnects >= breaks)
    await within(6, lambda: not proxy.breaking and agreed(members))  # longer than any fault lasts
    await asyncio.sleep(0.5)  # for what nobody should be shown
    return restarts


def agreed(members: list[Restless]) -> bool:
    """Whether all members of each room have been shown its last entry."""
    return len({(m.code, m.after) for m in members}) == len({m.code for m in members})


async def within(seconds: float, true) -> None:
    """Wait until something is true, but no longer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not true():
                await asyncio.sleep(0.05)


async def chaos(sabotage: str, seed: int, messages: int, breaks: int, rooms=3, size=16) -> Counter:
    """Let members talk through a proxy that breaks their connections; then check what they saw."""
    server = Server(SABOTAGE[sabotage], free=FREE | CHAOS)
    codes = [f"CHAS2{digit}" for digit in "23456789"[:rooms]]
    for code in codes:
        server.create_room(code)
    await asyncio.sleep(0.2)
    sockets = server.sockets()  # before: what it has open with nobody connected
    async with Proxy(server, random.Random(seed)) as proxy:
        members = [
            Restless(proxy, code, name, random.Random(f"{seed} {name}"), messages)
            for code in codes
            for name in (f"{code}-{number}" for number in range(size))
        ]
        restarts = await break_and_restart(server, proxy, members, breaks)
        for member in members:
            member.task.cancel()
        await asyncio.gather(*(member.task for member in members), return_exceptions=True)
        await Peer.close_all()
    await within(2, lambda: server.sockets() <= sockets)
    left_over = server.sockets() - sockets
    server.stop()
    talks = ([member for member in members if member.code == code] for code in codes)
    found = sum((check(talk, restarts) for talk in talks), Counter())
    found["left over"] = left_over
    found["restarts"] = len(restarts)
    found["reconnects"] = sum(member.dialled - 1 for member in members)
    print("\rproxy: " + ", ".join(f"{proxy.faults[fault]} {fault}" for fault in proxy.FAULTS))
    for end, count in sum((member.closes for member in members), Counter()).most_common():
        print(f"{count:8} × {' '.join(map(str, end))}")
    return found


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--messages", type=int, default=200, help="of each of the 48 members")
    parser.add_argument("--breaks", type=int, default=500, help="at least so many")
    parser.add_argument("--prove", action="store_true", help="plant faults, which must be found")
    sys.exit(not run_chaos(parser.parse_args()))
