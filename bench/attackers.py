"""The attackers of bench.attack and bench.memory, who run in a process of their own."""

import asyncio
import json
import os
import random
import struct
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from urllib.parse import quote

from bench.peer import RESET, Closed, Peer, fetch

ALPHABET = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"  # of room codes
THEIRS = [f"ATTCK{letter}" for letter in ALPHABET[:25]]  # rooms that are there, for attackers
LARGEST = "http://" + "&" * 1993  # as HTML 20,000 characters, of 4 bytes each for an Astral name
SNAIL = "\U0001f40c"  # one such character makes all of an entry take 4 bytes each
FOREVER = 3600  # seconds


def text_frame(**frame) -> bytes:
    """Return a frame in UTF-8: json would make 12 bytes of a character that has 4."""
    return json.dumps(frame, ensure_ascii=False).encode()


def some_code(start: str = "FX") -> str:
    return start + "".join(random.choices(ALPHABET, k=6 - len(start)))


# ── On the WebSocket ─────────────────────────────────────────────────────────────────────────────


async def bomb(port: int, number: int, address: str) -> None:
    peer = await Peer.connect(port, "PARTY2", address)
    zeros, squeeze = bytes(1 << 20), zlib.compressobj(9, zlib.DEFLATED, -15)
    payload = b"".join(squeeze.compress(zeros) for _ in range(256))
    payload += squeeze.flush(zlib.Z_SYNC_FLUSH)
    peer.send_bytes(payload[:-4], 0xC1 if peer.inflate else 0x81)
    await peer.read_all()


async def too_large(port: int, number: int, address: str) -> None:
    peer = await Peer.connect(port, "PARTY2", address)
    peer.writer.write(struct.pack("!BBQI", 0x81, 0xFF, 1 << 40, 0))
    await peer.flood(bytes(65_536))


async def pings(port: int, number: int, address: str) -> None:
    peer = await Peer.connect(port, "PARTY2", address)
    await peer.flood(b"\x89\x80\0\0\0\0" * 10_000)


async def fragments(port: int, number: int, address: str) -> None:
    peer = await Peer.connect(port, "PARTY2", address)
    peer.send_bytes(b"", 0x01)
    await peer.flood(b"\x00\x81\0\0\0\0x" * 10_000)


async def join(port: int, code: str, number: int, address: str) -> Peer:
    peer = await Peer.connect(port, code, address)
    peer.send(hello={"name": f"{SNAIL} {number}"})
    return peer


async def tiny_frames(port: int, number: int, address: str) -> None:
    peer = await join(port, "PARTY2", number, address)
    await peer.flood(b'\x81\x8a\0\0\0\0{"here":1}' * 5_000)


async def large_frames(port: int, number: int, address: str) -> None:
    """Send frames as large as they may be, then do not read what becomes of it."""
    peer = await join(port, "PARTY2", number, address)
    peer.stop_reading()
    await peer.flood(struct.pack("!BBHI", 0x81, 0xFE, 16_384, 0) + b'{"here":1}'.ljust(16_384))


async def marks(port: int, number: int, address: str) -> None:
    """Say letters with thousands of marks, which it takes long to put into order."""
    peer = await join(port, "PARTY2", number, address)
    for _ in range(70):
        peer.send_bytes(text_frame(say="a" + "\u0301" * 4_000 + "\u0316" * 4_000, id="x"))
        await asyncio.sleep(0.1)
    await peer.read_all()


async def slow_reader(port: int, number: int, address: str) -> None:
    """Be one of many who never read, while one in twenty says the largest messages there can be."""
    peer = await join(port, "PARTY2", number, address)
    if number % 20:
        peer.stop_reading()
        await asyncio.sleep(FOREVER)
    await say_again_and_again(peer, 0.55, LARGEST)


async def say_again_and_again(peer: Peer, pause: float, text: str, id: str = "") -> None:
    """Say a text again and again, always with the same id if there is one, and read what comes."""
    reading = asyncio.create_task(peer.read_all())
    for number in count():
        peer.send_bytes(text_frame(say=text, id=id or f"i{number}"))
        if (await asyncio.wait([reading], timeout=pause))[0]:
            return reading.result()


async def largest(port: int, number: int, address: str) -> None:
    await say_again_and_again(await join(port, THEIRS[0], number, address), 0.5, LARGEST)


async def largest_to_all(port: int, number: int, address: str) -> None:
    """Say the largest messages in the room of those who are measured."""
    await say_again_and_again(await join(port, "PARTY2", number, address), 0.5, LARGEST)


async def trickle(port: int, number: int, address: str) -> None:
    """Send a large frame byte by byte."""
    peer = await join(port, THEIRS[number % len(THEIRS)], number, address)
    reading = asyncio.create_task(peer.read_all())
    peer.writer.write(struct.pack("!BBHI", 0x81, 0xFE, 16_000, 0))
    while not (await asyncio.wait([reading], timeout=0.02))[0]:
        peer.writer.write(b" ")
    reading.result()


async def pieces(port: int, number: int, address: str) -> None:
    """Say what becomes of 1,333 pieces of HTML, in many rooms."""
    peer = await join(port, THEIRS[number % len(THEIRS)], number, address)
    await say_again_and_again(peer, 0.5, "`a`" * 666)


async def one_id(port: int, number: int, address: str) -> None:
    """Say something, then with the same id what it takes long to normalize."""
    peer = await join(port, THEIRS[0], number, address)
    peer.send(say="x", id="x")
    await say_again_and_again(peer, 0.1, "\U0001d160" * 4_070, "x")


async def busy_handler(port: int, number: int, address: str) -> None:
    peer = await Peer.connect(port, "BUSY22", address)
    await peer.flood((struct.pack("!BBHI", 0x81, 0xFE, 16_000, 0) + b"x" * 16_000) * 10)


async def storm(port: int, number: int, address: str) -> None:
    peer = await join(port, "PARTY2", number, address)
    await peer.receive()
    peer.writer.get_extra_info("socket").setsockopt(*RESET)


async def silent(port: int, number: int, address: str) -> None:
    """Connect, and say nothing."""
    try:
        await (await Peer.connect(port, THEIRS[0], address)).read_all()
    finally:
        await asyncio.sleep(2)


async def come_and_go(port: int, number: int, address: str) -> None:
    """Join a room in which others have talked, and leave it at once."""
    peer = await join(port, "KEEP22", number, address)
    await peer.receive()
    peer.send(leave=True)
    await peer.read_all()
    await asyncio.sleep(FOREVER)


# ── On HTTP ──────────────────────────────────────────────────────────────────────────────────────


async def half_open(port: int, number: int, address: str) -> None:
    peer = await Peer.dial(port, address)
    start = (b"", b"GET / HTTP/1.1\r\nHost: ", b"POST /r/PARTY2 HTTP/1.1\r\n")[number % 3]
    peer.writer.write(start)
    await peer.read_all()


async def endless_body(port: int, number: int, address: str) -> None:
    """Send a byte of a request's body now and then."""
    peer = await Peer.dial(port, address)
    start = f"POST /r/{THEIRS[0]} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 9999\r\n"
    peer.writer.write(f"{start}\r\n".encode())
    reading = asyncio.create_task(peer.read_all())
    while not (await asyncio.wait([reading], timeout=1))[0]:
        peer.writer.write(b"x")
    reading.result()
    await asyncio.sleep(1)


async def guess(port: int, number: int, address: str) -> None:
    """Try ten codes of rooms that are not there, and again every second."""
    for _ in range(10):
        await fetch(port, f"/r/{some_code('WR')}", address=address)
    await asyncio.sleep(1)


async def mistype(port: int, number: int, address: str) -> None:
    """Try ten codes, and no more."""
    await guess(port, number, address)
    await asyncio.sleep(FOREVER)


async def images(port: int, number: int, address: str) -> None:
    """Visit another site, whose page has images of rooms that are not there."""
    foreign = "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Dest: image\r\n"
    await fetch(port, f"/r/{some_code('WR')}", address=address, headers=foreign)
    await asyncio.sleep(FOREVER)


async def rooms(port: int, number: int, address: str) -> None:
    """Create as many rooms as one address may, and enter none of them."""
    for _ in range(30):
        await fetch(port, f"/r/{some_code()}", "POST", address)
    await asyncio.sleep(FOREVER)


async def home_page(port: int, number: int, address: str) -> None:
    await fetch(port, "/", address=address)


async def qr_codes(port: int, number: int, address: str) -> None:
    """Have the server draw a code that it has not drawn before, as large as there are."""
    host = f"{random.randbytes(30).hex()}.{random.randbytes(14).hex()}"
    await fetch(port, f"/r/{THEIRS[0]}", address=address, host=host)


async def typed_codes(port: int, number: int, address: str) -> None:
    await fetch(port, "/join?code=" + quote("\u0301\u0316" * 1_300), address=address)


async def many_headers(port: int, number: int, address: str) -> None:
    await fetch(port, "/", address=address, headers="a:\r\n" * 3_700)


# ── All of them ──────────────────────────────────────────────────────────────────────────────────


def addresses(many: int) -> list[str]:
    return [f"127.0.1.{number + 1}" for number in range(many)]


def household(many: int) -> list[str]:
    """Return so many of the 256 networks (/64) that a household gets (/56)."""
    return [f"2001:db8:0:{number:x}::1" for number in range(many)]


@dataclass
class Attack:
    """So many do something at once, each again and again, from one address or in turn from several."""

    count: int
    act: Callable[[int, int, str], Awaitable[None]]
    addresses: list[str] = field(default_factory=lambda: addresses(1))
    newcomer: str = "127.0.0.8"  # the address from which somebody new enters meanwhile


ATTACKS = {
    "deflate bomb": Attack(20, bomb),
    "flood after 1009": Attack(5, too_large),
    "empty pings": Attack(5, pings),
    "1-byte fragments": Attack(5, fragments),
    "tiny frames": Attack(5, tiny_frames),
    "large frames": Attack(5, large_frames),
    "many marks": Attack(5, marks),
    "byte by byte": Attack(480, trickle, addresses(2)),
    "slow readers": Attack(100, slow_reader),
    "busy handler": Attack(5, busy_handler),
    "half-open": Attack(500, half_open),
    "half-open, a pupil": Attack(600, half_open, newcomer="127.0.1.1"),
    "reconnect storm": Attack(50, storm),
    "largest message": Attack(250, largest),
    "largest, 3 addresses": Attack(250, largest, addresses(3)),
    "largest, to all": Attack(60, largest_to_all),
    "`a` 666 times": Attack(250, pieces),
    "one id again": Attack(250, one_id),
    "wrong codes": Attack(20, guess, addresses(20)),
    "wrong codes, a pupil": Attack(1, mistype, newcomer="127.0.1.1"),
    "images elsewhere": Attack(70, images, newcomer="127.0.1.1"),
    "rooms, IPv6 /56": Attack(40, rooms, household(40)),
    "silent, IPv6 /56": Attack(1_999, silent, household(8)),
    "rooms, 33 addresses": Attack(33, rooms, addresses(33)),
    "come and go": Attack(120, come_and_go),
    "GET /": Attack(1_000, home_page),
    "QR codes": Attack(1_000, qr_codes),
    "typed codes": Attack(100, typed_codes),
    "3,700 headers": Attack(250, many_headers),
    "endless bodies": Attack(3_300, endless_body),
}


def strike(name: str, port: int, seconds: float) -> None:
    """Attack a server for so many seconds, with less of a core than those who measure."""
    attack = ATTACKS[name]
    Peer.offer = Peer.offer if attack.act is bomb else ""

    async def attacker(number: int) -> None:
        while True:
            with suppress(Closed, OSError, asyncio.IncompleteReadError):
                await attack.act(port, number, attack.addresses[number % len(attack.addresses)])
            await asyncio.sleep(0.01)

    async def attackers() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
                for number in range(attack.count):
                    group.create_task(attacker(number))

    os.nice(5)
    asyncio.run(attackers())
