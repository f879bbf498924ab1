"""Fill a server to its limits, and compare its memory with what is computed from them.

    python -m bench.memory                # 1,000 rooms of one who talks, and one who never reads
    python -m bench.memory --rooms 100
    python -m bench.memory --attacks      # and what the attacks add that are after memory

Those who talk use the most expensive characters that there are.
"""

import argparse
import asyncio
import signal

from bench.attack import print_heading, try_out
from bench.attackers import LARGEST
from bench.peer import FREE, HERE, Peer, Server, progress

WIDE = 4  # bytes that a str takes for each of its characters, if only one of them is Astral
LARGEST_ENTRY = 20_600  # characters of the largest entry, see LARGEST
HEAD = 130  # bytes of an entry beside its text: tuple, number
ID = 40  # bytes of the id of a message: its hash, and a place in a deque
ATTACKS = (
    "deflate bomb",
    "flood after 1009",
    "1-byte fragments",
    "large frames",
    "slow readers",
    "largest message",
    "largest, 3 addresses",
    "3,700 headers",
    "endless bodies",
)


def worst_case(rooms: int, sockets: int) -> dict[str, float]:
    """Compute from the limits what a server can come to hold, part by part, in MB."""
    import chat  # here only: all other programs know it through its sockets

    limits = chat.limits
    frame = max(chat.FRAME_SIZE, LARGEST_ENTRY)
    parts = {
        "connections": sockets * (48 + 11) * 1024,  # and the garbage of 1,500
        "ids and histories": 2 * sockets * chat.IDS_REMEMBERED * ID
        + rooms * (limits["HISTORY_BYTES"] + limits["HISTORY"] * HEAD),
        "in flight": sockets / 2 * frame * (WIDE + 2),  # a str, the frame, the transport's copy
        # Shared by the members of a room, and with them what is pending.
        "outboxes": rooms * (limits["OUTBOX_BYTES"] + chat.PENDING_BYTES),
    }
    return {name: size / 1e6 for name, size in parts.items()}


async def fill(options) -> None:
    """Fill a server to its caps with rooms of one who talks and one who never reads, and compare."""
    rooms, gate = options.rooms, asyncio.Semaphore(20)
    settings = {"CHAT_ROOMS": str(rooms), "CHAT_SOCKETS": str(2 * rooms)}
    settings["CHAT_BEAT"] = "1e6"  # all but one are silent at a time
    server = Server(end=signal.SIGKILL, free=FREE | settings)
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
    note("ids and histories")
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rooms", type=int, default=1_000)
    parser.add_argument("--ids", type=int, default=256, help="messages of each who talks")
    parser.add_argument("--batches", type=int, default=10, help="largest messages of each")
    parser.add_argument("--attacks", action="store_true", help="attack a server, too")
    options = parser.parse_args()
    Peer.offer = ""  # or it would have to inflate
    asyncio.run(fill(options))
    if options.attacks:
        print_heading()
        for attack in ATTACKS:
            try_out(attack, str(HERE), 25)
