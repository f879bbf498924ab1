# /// script
# requires-python = ">=3.11, <3.14"
# dependencies = [  # as in requirements.txt
#     "quart==0.22.0", "hypercorn==0.18.0", "wsproto==1.3.2", "h11==0.16.0", "h2==4.4.1",
#     "werkzeug==3.1.9", "flask==3.1.3", "jinja2==3.1.6", "itsdangerous==2.2.0",
#     "markupsafe==3.0.4", "segno==1.6.6",
# ]
# ///
"""A room chat on WebSockets: rooms, fan-out, delivery and pages, all of it in this file.

    pip install -r requirements.txt
    python chat.py                  # then open http://127.0.0.1:8000 in two tabs

The path of a message. Only its two ends await; in the middle are plain functions, and while one of
them runs, nothing else does:

    browser ─frame─▶ receive ─▶ post ─▶ room.pending ─▶ hand_out ─▶ outboxes ─▶ relay ─frame─▶ browsers
                     (await)    (def)                   (def)       (queues)    (await)

The words:

    room     people who talk, found by a code such as KWR4TN; gone when the last member has left,
             or if nobody enters
    member   one tab in one room: here (has an outbox), reconnecting (has none) or left (forgotten)
    host     who has been in the room longest, in this run: can lock it, and remove somebody
    entry    a line of the log, message or notice; its seq is one more than that of the entry before
    outbox   what one connection still has to be sent, in batches of frames; bounded, so that nobody
             waits for the slow
    hand-out to put into the outboxes all that is pending in a room
    snapshot what a newcomer, a connection just made, is given instead: all that its member missed
    token    signed proof of having been in a room; comes with the snapshot, is shown to come back
    evict    to end a connection that has missed something; its member comes back by itself, and
             resumes: is given what was said since the last entry that it has
    frame    what a WebSocket carries: JSON from the browser, fragments of HTML to it
"""

import argparse
import asyncio
import io
import json
import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
import time
import unicodedata
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

try:
    import segno
    from hypercorn.asyncio import serve
    from hypercorn.config import Config
    from itsdangerous import BadSignature, URLSafeSerializer
    from quart import Quart, has_request_context, redirect, render_template, request, websocket
    from werkzeug.exceptions import HTTPException, NotFound

    import guards
except ImportError as missing:  # a package, or in a package something that guards.py needs
    sys.exit(f"{missing.msg}. Install what is needed: pip install -r requirements.txt")

# ── Limits ───────────────────────────────────────────────────────────────────────────────────────

SETTINGS = {  # in the environment, as in CHAT_MEMBERS=40: the default, and what it limits
    "MESSAGE_LENGTH": (2_000, "characters of a message"),
    "RATE": (2.0, "frames a second of one member, which are read later if there are more"),
    "BURST": (20, "frames at once; for this and the rate, each KiB of a frame counts as one more"),
    "SHARE": (0.25, "seconds a second that one address may keep the server busy; then it waits"),
    "MEMBERS": (250, "members of a room"),
    "SOCKETS": (2_000, "connections in all"),
    "SOCKETS_PER_ADDRESS": (250, "connections, and joins in ten minutes, of one address"),
    "ROOMS": (1_000, "rooms"),
    "NEW_ROOMS": (30, "rooms that one address can create at once, and again in ten minutes"),
    "WRONG_CODES": (60, "wrong codes in ten minutes from one address"),
    "CODE_LENGTH": (6, "characters of a room code; 8 on the open internet"),
    "HISTORY": (200, "messages that a room remembers"),
    "HISTORY_BYTES": (65_536, "bytes that these may take"),
    "OUTBOX_BYTES": (98_304, "bytes that may wait for one slow member, beside its snapshot"),
    "FRAMES_PER_SECOND": (14_000, "the pace of a room: frames to all its members together"),
    "BEAT": (20.0, "seconds from one heartbeat to the next; silent for 2.5 of them is lost"),
    "GRACE": (120.0, "seconds to come back after losing the connection: phones freeze tabs"),
    "PROXIES": (0, "proxies in front, whose X-Forwarded-For and -Proto are believed"),
    "ORIGINS": ("", "other origins whose pages may connect, with commas between them"),
    "SECRET": ("", "signs the tokens, at least 16 characters; empty: a new one at each start"),
}
JOIN_DEADLINE = 10  # seconds to say a usable hello
GRACE_CLOSED = 5  # seconds to come back after closing the page: a reload is no leaving
UNENTERED = 600  # seconds that a room waits for its first member
ALPHABET = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"  # of room codes, which are read out: no 0 O 1 I L
ID = re.compile("[A-Za-z0-9_-]{1,64}")
NOTICES_REMEMBERED = 30  # of a room
IDS_REMEMBERED = 128  # of each member; our page has one unconfirmed at a time
FRAME_SIZE = 16_384  # characters of a frame to one member, which nobody shares the memory of
FRAME_SIZE_FOR_ALL = 131_072  # the same string for all: larger, because few large ones are fast
FRAME_UNIT = 262_144  # a frame of so many characters takes twice as long to send as a short one
OUTBOXES_AT_ONCE = 50  # to send to so many takes about 5 ms
PRESENCES_PER_SECOND = 500  # names that one member is shown in lists of members
PENDING_BYTES = 114_688  # while more waits in a room for its hand-out, its senders are not read
CONNECTION = 0.0005  # seconds that to accept one takes, most of them in Hypercorn

# What they mean, and whether the page comes back by itself. For what is no WebSocket, wsproto adds
# 1002 and 1007.
CLOSE_CODES = {
    1000: ("you left", "no"),
    1008: ("you broke a rule, the reason says which", "no"),
    1009: ("that frame was too large", "no"),
    1011: ("the server has made a mistake", "yes"),
    1012: ("the server restarts", "yes"),
    1013: ("you were too slow, silent, or one too many for now", "yes, and resume"),
    4401: ("this token is not for this room", "no, give a name again"),
    4403: ("you have been removed, or the room is locked", "no"),
    4404: ("there is no such room, or it has closed", "no"),
    4409: ("you opened this chat in another tab", "no, it goes on there"),
    4503: ("the room or the server is full", "no"),
}


class Close(Exception):
    """Ends a connection, or is shown as a page. Has one of these codes, and a reason to read."""

    def __init__(self, code: int, reason: str):
        super().__init__(code, reason)
        self.code, self.reason = code, reason


class Chat(Quart):
    async def handle_request(self, request):
        """Answer a request, unless its address has kept us too busy: then later. See `turn`."""
        async with turn(address_of(request)):
            return await super().handle_request(request)


app = Chat(__name__, static_folder=None)
app.url_map.merge_slashes = False  # or `//` would be answered with a redirect to any Host
limits = app.config


def read_settings() -> None:
    """Take the settings from the environment; ValueError says which of them cannot be."""
    for name, (default, _) in SETTINGS.items():
        told = os.environ.get(f"CHAT_{name}", default)
        try:
            limits[name] = type(default)(told)
        except ValueError:
            kind = "a whole number" if type(default) is int else "a number"
            raise ValueError(f"CHAT_{name} has to be {kind}, not {told!r}.") from None
        unset = limits[name] == default  # which may be 0, or empty
        if not unset and type(default) is not str and not 0 < limits[name] < math.inf:
            raise ValueError(f"CHAT_{name} has to be more than 0, not {told}.")
    if 0 < len(limits["SECRET"]) < 16:
        raise ValueError("CHAT_SECRET has to have 16 characters or more, or it can be guessed.")
    limits["SECRET"] = limits["SECRET"] or secrets.token_hex()


try:
    read_settings()
except ValueError as why:
    print(why, file=sys.stderr)
    sys.exit(2)  # systemd, too, is told by this that to try again does not help


class Allowance:
    """A token bucket: `burst` tokens at most, and `rate` new ones a second."""

    def __init__(self, rate: float, burst: float):
        self.rate, self.burst = rate, burst
        self.tokens, self.checked = burst, time.monotonic()

    def left(self) -> float:
        now = time.monotonic()
        self.tokens = min(self.burst, self.tokens + (now - self.checked) * self.rate)
        self.checked = now
        return self.tokens

    def spend(self, tokens: float) -> None:
        """Take tokens, also on credit: less than none is left then, until that is paid."""
        self.tokens = self.left() - tokens

    def until_paid(self) -> float:
        """Return the seconds until nothing is on credit any more."""
        return max(0, -self.left() / self.rate)


# ── State ── rooms and outboxes ──────────────────────────────────────────────────────────────────


class Outbox(asyncio.Queue):
    """What one connection still has to be sent, and what else we know of that connection.

    In it are batches of frames, with their sizes, and in the end perhaps a Close.
    """

    def __init__(self, address: str):
        super().__init__()
        self.address = address
        self.bytes = 0  # of the batches that wait and are counted
        self.allowance = Allowance(limits["RATE"], limits["BURST"])  # for frames from the browser
        self.grace = limits["GRACE"]  # seconds to come back if it ends now
        self.hung_up = False  # we have ended it, and do not act any more on what it says
        self.member: Member | None = None  # set by enter
        self.after: int | None = None  # of a newcomer: the number of the last entry that it has

    def hang_up(self, code: int, reason: str) -> None:
        """Have the relay end the connection, after what waits; the first reason counts."""
        if not self.hung_up:
            self.hung_up = True
            self.put_nowait((Close(code, reason), 0))


@dataclass(eq=False, slots=True)
class Member:
    room: "Room"
    id: str  # public, stands in every message; says nothing about the token
    name: str
    address: str  # of its latest connection
    hue: int  # of its name, 0 to 15: the least used in its room
    allowance: Allowance  # kept when it comes back, or to do so would refill it
    outbox: Outbox | None = None  # None while reconnecting
    timer: asyncio.TimerHandle | None = None  # while reconnecting: when it will have left
    posted: deque[int] = field(default_factory=lambda: deque(maxlen=IDS_REMEMBERED))  # hashed


@dataclass(eq=False, slots=True)
class Room:
    code: str
    birth: int  # in milliseconds; stands in the tokens: later, the same code is another room
    creator: str  # address of who has opened it
    start: int  # seq with which it began in this run
    seq: int  # of the latest entry
    forgotten: int  # all messages after this seq are in the history
    unentered: asyncio.TimerHandle | None = None  # closes the room unless somebody enters
    members: dict[str, Member] = field(default_factory=dict)  # the first is the host
    history: deque[tuple[int, str]] = field(default_factory=deque)  # messages with their seqs
    history_bytes: int = 0
    # Notices are kept apart, so that they push no message out.
    notices: deque[tuple[int, str]] = field(
        default_factory=lambda: deque(maxlen=NOTICES_REMEMBERED)
    )
    pending: list[str] = field(default_factory=list)  # fragments that are in no outbox yet
    pending_bytes: int = 0  # of the entries among them
    typing: set[Member] = field(default_factory=set)  # since the last hand-out
    timer: asyncio.TimerHandle | None = None  # of hand_out, or of deliver's next slice; None: idle
    presence: asyncio.TimerHandle | None = None  # of the list of members, if that has changed
    locked: bool = False
    removed: set[str] = field(default_factory=set)  # ids of members who may not come back


rooms: dict[str, Room] = {}
outboxes: dict[Outbox, None] = {}  # of all connections but those that made way, oldest first
closed: deque[str] = deque(maxlen=1_000)  # codes of the rooms that have closed, the latest last
RUN = secrets.token_hex(4)  # this run of the program; a token that names another is older
runs: dict[str, float] = {}  # the other ones, and when we saw a token of theirs first
stopping = asyncio.Event()
RESTART = "The server restarts."

log = logging.getLogger("chat")  # no message, name, code or token
noted: Counter[str] = Counter()  # what has happened in the last minute, and how often

# Each macro of fragments.html becomes a function. They are called where nothing may await, so the
# template engine is one that does not.
fragments = app.jinja_env.overlay(enable_async=False).get_template("fragments.html").module


def later(seconds: float, call, *arguments) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(seconds, call, *arguments)


# ── Fan-out ──────────────────────────────────────────────────────────────────────────────────────
# One event loop runs everything, and it changes from one task to another only at an await. These
# functions have none, so each of them happens as a whole, and none of them needs a lock.


def post(room: Room, fragment, **values) -> None:
    """Give an entry the room's next number, render it once for everybody, and have it sent."""
    room.seq += 1
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = str(fragment(seq=room.seq, time=now, **values))
    size = sys.getsizeof(entry)
    if fragment is fragments.notice:
        room.notices.append((room.seq, entry))
    else:
        room.history.append((room.seq, entry))
        room.history_bytes += size
        while len(room.history) > limits["HISTORY"] or (
            room.history_bytes > limits["HISTORY_BYTES"] and len(room.history) > 1
        ):
            room.forgotten, oldest = room.history.popleft()
            room.history_bytes -= sys.getsizeof(oldest)
    room.pending.append(entry)
    room.pending_bytes += size
    wake(room)


def wake(room: Room) -> None:
    """Have a hand-out soon: if the room rests, its timer will do it; if not, the loop's next turn.

    Not at once, so that ten messages that arrive together go out together.
    """
    if not room.timer:
        room.timer = later(0, hand_out, room)


def hand_out(room: Room) -> None:
    """Give newcomers snapshots, and the others what is pending; rest for as long as that takes.

    An idle room thus sends in the loop's next turn. A busy one sends fewer and larger frames instead
    of falling behind, because a frame costs a wake-up and a system call, however little is in it.
    """
    room.timer = None
    news, room.pending, room.pending_bytes = room.pending, [], 0
    typing, room.typing = list(room.typing)[:4], set()  # four are a crowd
    connected = [member.outbox for member in room.members.values() if member.outbox]
    newcomers = [outbox for outbox in connected if outbox.after is not None]
    here = [outbox for outbox in connected if outbox.after is None]
    try:
        if newcomers:  # the news is for those who were here: these find it in their snapshot
            give_snapshots(room, newcomers[:OUTBOXES_AT_ONCE])
        if typing:  # news for a moment only: neither numbered nor remembered
            news.append(str(fragments.typing(typing)))
        if batch := list(in_frames(news, FRAME_SIZE_FOR_ALL)):
            work = sum(1 + len(frame) / FRAME_UNIT for frame in batch) * len(here)
            deliver(room, batch, here, time.monotonic() + work / limits["FRAMES_PER_SECOND"])
    except Exception:  # some may have it now, and others not: all of them resume
        log.exception("A hand-out failed")
        for outbox in connected:
            evict(outbox, "The server has made a mistake. Come back and resume.")
    if newcomers[OUTBOXES_AT_ONCE:]:
        wake(room)


def in_frames(strings: list[str], most: int) -> Iterator[str]:
    """Join strings to frames of at most so many characters, unless a single one has more."""
    frame = ""
    for string in strings:
        if frame and len(frame) + len(string) > most:
            yield frame
            frame = ""
        frame += string
    if frame:
        yield frame


def give_snapshots(room: Room, newcomers: list[Outbox]) -> None:
    """Give newcomers what was said since the last entry that they have; 0: all that is remembered.

    While this runs nothing is pending: what was said until now is in the history, and what is said
    from now on comes with the next hand-out. With an await in here, an entry of that moment could
    come twice, or before older ones.
    """
    entries = sorted([*room.history, *room.notices])
    for outbox in newcomers:
        after, outbox.after = outbox.after, None
        member = outbox.member
        token = signer().dumps([room.code, room.birth, RUN, member.id, member.name])
        # Some of it is forgotten, or the number is none of ours: all that there is, behind a line.
        hole = after != 0 and not room.forgotten <= after <= room.seq
        gap = [str(fragments.gap(room.forgotten, after < room.start))] if hole else []
        since = room.forgotten if hole else after
        missed = [entry for seq, entry in entries if seq > since]
        snapshot = in_frames([str(fragments.welcome(member, token)), *gap, *missed], FRAME_SIZE)
        outbox.put_nowait((list(snapshot), 0))  # uncounted, or a long history would evict them
    show_presence(room)


def signer() -> URLSafeSerializer:
    return URLSafeSerializer(limits["SECRET"], salt="member")


def deliver(room: Room, batch: list[str], receivers: list[Outbox], rest_until: float) -> None:
    """Put a batch into outboxes, a few in each turn of the loop, so that other rooms get theirs."""
    first, others = receivers[:OUTBOXES_AT_ONCE], receivers[OUTBOXES_AT_ONCE:]
    if others:
        room.timer = later(0, deliver, room, batch, others, rest_until)
    else:
        room.timer = later(rest_until - time.monotonic(), hand_out, room)
    for outbox in first:
        send(outbox, batch)


def send(outbox: Outbox, batch: list[str]) -> None:
    """Put a batch of frames into an outbox; if that is full, evict its member rather than wait.

    Waiting would make the room as slow as its slowest member, and without a bound one dead phone
    would eat the memory. Where nothing waits any batch goes in, or a large one never could.
    """
    size = sum(map(sys.getsizeof, batch))
    if outbox.bytes and outbox.bytes + size > limits["OUTBOX_BYTES"]:
        return evict(outbox, "You were too slow. Come back and resume.")
    outbox.bytes += size
    outbox.put_nowait((batch, size))


def evict(outbox: Outbox, why: str) -> None:
    """End a connection that has missed something; its member comes back, and resumes."""
    if not outbox.hung_up:
        while not outbox.empty():  # it will be given that again, when it resumes
            outbox.get_nowait()
        outbox.hang_up(1013, why)
        lose(outbox)


def show_presence(room: Room) -> None:
    """Have the list of members shown soon: it goes to all and names all, so it has its own pace."""
    if not room.presence:
        room.presence = later(len(room.members) / PRESENCES_PER_SECOND, add_presence, room)


def add_presence(room: Room) -> None:
    room.presence = None
    room.pending.append(str(fragments.presence(room)))
    wake(room)


# ── Coming and going ─────────────────────────────────────────────────────────────────────────────


def create_room(code: str, address: str = "", birth: int = 0) -> Room:
    """Open a room for an address, or return the one that is there, for a class or a double click.

    Close: 1008 if the address has opened too many, even if the room is there, or it could find out
    in this way which codes are taken; 4503 if there are too many rooms. A room that was born in
    another run is opened again. Its numbers start from the clock, in milliseconds, and thus above its
    old ones, so that an old number is never mistaken for a new one.
    """
    why = "Your network has created many rooms. Wait a minute, and try again."
    check("NEW_ROOMS", address, why)
    if code in rooms:
        return rooms[code]
    if len(rooms) >= limits["ROOMS"]:  # the oldest that nobody has entered makes way
        empty = next((room for room in rooms.values() if not room.members), None)
        if not empty:
            raise Close(4503, "There are too many rooms. Try again later.")
        close_room(empty)
    allowance("NEW_ROOMS", address).spend(1)
    now = time.time_ns() // 1_000_000
    room = rooms[code] = Room(code, birth or now, address, start=now, seq=now, forgotten=now)
    room.unentered = later(UNENTERED, close_room, room)
    return room


def close_room(room: Room) -> None:
    for timer in (room.unentered, room.timer, room.presence):
        if timer:
            timer.cancel()
    room.timer = None  # or who is in take_in would wait for a hand-out that never comes
    del rooms[room.code]
    closed.append(room.code)


def enter(member: Member, outbox: Outbox, after: int) -> None:
    """Connect a member, which is to be given what was said since the entry `after`."""
    room = member.room
    room.unentered.cancel()
    if member.timer:
        member.timer.cancel()
    if member.outbox:
        member.outbox.hang_up(4409, "You opened this chat in another tab.")
    room.members[member.id] = member
    member.outbox, member.address = outbox, outbox.address
    outbox.member, outbox.after, outbox.allowance = member, after, member.allowance
    wake(room)


def lose(outbox: Outbox) -> None:
    """Note that a connection has ended: its member leaves, unless it is back within the grace."""
    member = outbox.member
    if not member or member.outbox is not outbox:
        return  # never joined, or has another connection by now
    member.outbox = None
    if outbox.grace:
        member.timer = later(outbox.grace, leave, member, "left")
        show_presence(member.room)
    else:
        leave(member, "left")


def leave(member: Member, what: str) -> None:
    """Take a member out of its room, and forget the room with the last one."""
    room = member.room
    if member.timer:
        member.timer.cancel()
    room.typing.discard(member)
    del room.members[member.id]
    if not room.members:
        return close_room(room)
    post(room, fragments.notice, name=member.name, what=what)
    show_presence(room)


# ── The WebSocket ────────────────────────────────────────────────────────────────────────────────


@app.websocket("/r/<code>/ws")
async def connection(code: str):
    """Serve one connection: receive and relay side by side, until it ends.

    In a TaskGroup, in which an exception of the one ends the other: a member that can still hear
    but no longer speak is worse than one that is gone. We end it by raising Close in one of them;
    if the browser ends it, or the network does, Quart cancels this, and both with it.
    """
    ws = websocket._get_current_object()  # what `websocket` stands for, looked up once
    outbox = Outbox(address_of(ws))
    async with turn(outbox.address, CONNECTION):
        if not same_origin():
            note("CHAT_ORIGINS: a page of another site has tried to connect")
            return "This page may not connect here.", 403
        await ws.accept()  # also those turned away below: browsers show only the code of a close
    end = Close(1011, "The server has made a mistake.")
    outboxes[outbox] = None
    make_way(outbox)
    if stopping.is_set():
        outbox.hang_up(1012, RESTART)
    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(relay(outbox, ws))
            both.create_task(receive(code, outbox, ws))
    except* Close as closes:  # the TaskGroup raises what was raised in it as a group
        end = closes.exceptions[0]
        note(f"Closed with {end.code}: {end.reason}")
    except* OSError:
        pass  # the network has given up
    except* Exception as errors:
        log.error("A connection failed", exc_info=errors)
    finally:
        try:
            with suppress(OSError):  # the network has given up
                # Always with a code: without, it would be 1000, and nobody would come back.
                await ws.close(end.code, end.reason)
        finally:
            outboxes.pop(outbox, None)


def same_origin() -> bool:
    """Whether the page that opens this WebSocket is ours, or listed in CHAT_ORIGINS.

    Without, every page on the internet could do so from its visitors' browsers. A page cannot
    choose its Origin; a program has to send one, too.
    """
    allowed = limits["ORIGINS"].replace(",", " ").split()
    if host := websocket.headers.get("Host"):
        allowed.append(f"{guards.scheme(websocket, limits['PROXIES'])}://{host}")
    origin = guards.plain_origin(websocket.headers.get("Origin", ""))
    return origin in map(guards.plain_origin, allowed)


async def relay(outbox: Outbox, ws) -> None:
    """Carry batches from the outbox to the socket, until there is a Close instead."""
    while True:
        batch, size = await outbox.get()
        outbox.bytes -= size
        if isinstance(batch, Close):
            raise batch
        for frame in batch:
            await ws.send(frame)
        batch = frame = None  # or an idle relay keeps them: half a gigabyte with 1,000 members


async def receive(code: str, outbox: Outbox, ws) -> None:
    """Take in frame after frame: a hello, then the rest, until the connection ends."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(JOIN_DEADLINE) as deadline:
            while True:
                raw = await ws.receive()
                if outbox.member:
                    deadline.reschedule(None)  # from here on it is we who are slow
                await take_in(parse(raw, outbox.allowance), code, outbox)
                raw = None  # as in relay
                if outbox.member:
                    deadline.reschedule(loop.time() + 2.5 * limits["BEAT"])
    except TimeoutError:
        raise Close(1013, "You were silent for too long. Come back.") from None
    except Close:  # who has left, or has broken a rule, does not come back
        outbox.grace = 0
        raise
    finally:
        lose(outbox)


def parse(raw, allowance: Allowance) -> dict:
    """Return a frame, an object with one verb; Close 1008 or 1009 if it is anything else."""
    if isinstance(raw, guards.Violation):
        raise Close(*raw)
    if not isinstance(raw, str):
        raise Close(1008, "A frame has to be text.")
    size = len(raw.encode())
    if size > largest_frame():
        raise Close(1009, f"A frame has at most {largest_frame()} bytes.")
    allowance.spend(1 + size // 1024)
    try:
        frame = json.loads(raw)
        if "\\u" in raw:
            json.dumps(frame, ensure_ascii=False).encode()  # "\ud800" can be read, but not sent
    except (ValueError, RecursionError):
        raise Close(1008, "A frame has to be JSON.") from None
    if not isinstance(frame, dict) or len(frame) != (2 if "id" in frame else 1):
        raise Close(1008, "A frame has to be an object with one verb.")
    return frame


def largest_frame() -> int:
    """Return how many bytes a frame may have; of a character browsers make six at most."""
    return 8 * limits["MESSAGE_LENGTH"] + 384


async def take_in(frame: dict, code: str, outbox: Outbox) -> None:
    """Act on a frame, when its sender, its room and its address have not been too busy.

    Who sends too much is not told so, but read more slowly: what we do not read fills the buffers
    on the way, and then TCP has the sender wait. That is backpressure.
    """
    grace = limits["GRACE"]
    outbox.grace = min(grace, GRACE_CLOSED) if "bye" in frame else grace
    if wait := outbox.allowance.until_paid():
        await asyncio.sleep(wait)
    if member := outbox.member:
        room, loop = member.room, asyncio.get_running_loop()
        # Its snapshot comes first, or an answer could be there before what it is an answer to.
        while room.timer and (room.pending_bytes > PENDING_BYTES or outbox.after is not None):
            await asyncio.sleep(room.timer.when() - loop.time())
    async with turn(outbox.address):
        if outbox.hung_up:
            return  # a message will be said again on the next connection
        if member:
            act(member, frame)
        else:
            hello(code, outbox, frame)


def hello(code: str, outbox: Outbox, frame: dict) -> None:
    """Let somebody in; or say what is wrong with the name, so that there can be another hello."""
    match frame:
        case {"hello": {"name": str(name)}}:
            try:
                join(code, name, outbox)
            except ValueError as why:
                send(outbox, [str(fragments.unusable(why))])
        case {"hello": {"token": str(token), "after": int(after)}}:
            try:
                come_back(code, token, after, outbox)
            except Close as close:
                if close.code in (1008, 4503):  # full, or too many new rooms: that will pass
                    raise Close(1013, close.reason) from None
                raise
        case _:
            raise Close(1008, "The first frame has to be a hello.")


def act(member: Member, frame: dict) -> None:
    """Do what a member says; Close 1000 if it leaves, 1008 if that is nothing that it may say."""
    room = member.room
    host = next(iter(room.members.values())) is member
    match frame:
        case {"say": str(text), "id": str(id)} if ID.fullmatch(id):
            say(member, id, text)
        case {"typing": True}:
            room.typing.add(member)
            wake(room)
        case {"here": int()} | {"bye": True}:
            pass  # that it came is enough; for bye, see take_in
        case {"leave": True}:
            raise Close(1000, "You left the room.")
        case {"lock": bool(locked)} if host:
            room.locked = locked
            what = "locked the room" if locked else "unlocked the room"
            post(room, fragments.notice, name=member.name, what=what)
            show_presence(room)
        case {"remove": str(id)} if host:
            if somebody := room.members.get(id):
                remove(somebody)
        case _:
            raise Close(1008, "That is not a frame of this chat.")


def say(member: Member, id: str, text: str) -> None:
    """Post what a member says, once; or tell it that this had been posted, or why it cannot be."""
    key = hash(id)  # smaller to remember
    if key in member.posted:  # sent again, because the echo had not reached it
        return send(member.outbox, [str(fragments.verdict(id, "confirmed", ""))])
    text = guards.clean(text)
    if not text.strip() or len(text) > limits["MESSAGE_LENGTH"]:
        why = f"A message has 1 to {limits['MESSAGE_LENGTH']} characters."
        return send(member.outbox, [str(fragments.verdict(id, "refused", why))])
    member.room.typing.discard(member)
    post(member.room, fragments.message, member=member, id=id, pieces=guards.pieces(text))
    member.posted.append(key)


def remove(member: Member) -> None:
    """Have a member leave because the host wants it so. Its token is good no more, in this run."""
    member.room.removed.add(member.id)
    if member.outbox:
        member.outbox.hang_up(4403, "The host has removed you from this room.")
        member.outbox = None
    leave(member, "was removed")


# ── Who comes in ─────────────────────────────────────────────────────────────────────────────────


def join(code: str, raw_name: str, outbox: Outbox) -> None:
    """Let somebody new into a room.

    ValueError says why a name cannot be used. Close: 1008 too many wrong codes, 4404 no such room,
    4403 locked, 4503 full, or too many have joined.
    """
    name = guards.usable_name(raw_name)
    room = find_room(code, outbox.address)
    if not room:
        raise Close(4404, "There is no such room, or it has closed.")
    add_member(room, secrets.token_hex(8), name, outbox)


def come_back(code: str, token: str, after: int, outbox: Outbox) -> None:
    """Let somebody in who was in a room before, even before a restart, and resume.

    Close: 4401 not a token of this room, 4404 closed, 4403 removed, and as create_room, add_member.
    """
    try:
        home, birth, run, id, name = signer().loads(token)
    except (BadSignature, TypeError, ValueError):
        home = None  # forged, or signed with the secret of another start
    room = rooms.get(code)
    if home != code or (room and room.birth != birth):
        raise Close(4401, "You were not in this room. Give your name again.")
    # For a while after the first token of another run: that run's rooms are opened again.
    now = time.monotonic()
    first_seen = now if run == RUN else runs.setdefault(run, now)
    restarted = run != RUN and now - first_seen < limits["GRACE"]
    if not room:
        if not restarted:
            raise Close(4404, "This room has closed.")
        room = create_room(code, outbox.address, birth)
    if id in room.removed:
        raise Close(4403, "The host has removed you from this room.")
    if member := room.members.get(id):
        enter(member, outbox, after)
    else:
        add_member(room, id, name, outbox, after, restarted)


def add_member(room: Room, id: str, name: str, outbox: Outbox, after=0, restarted=False) -> None:
    """Make a member, and have it enter.

    Close: 4403 the room is locked, 4503 it or the server is full, or too many have joined.
    Who was here before a restart enters without a notice, and even if the room is locked again.
    """
    others = list(room.members.values())
    if room.locked and not restarted:
        raise Close(4403, "This room is locked: nobody new comes in.")
    # Lost ones count, too, or to say hello and hang up, a thousand times, would fill the server.
    if sum(len(each.members) for each in rooms.values()) >= 2 * limits["SOCKETS"]:
        raise Close(4503, "This server is full. Try again later.")
    if sum(member.outbox is not None for member in others) >= limits["MEMBERS"]:
        raise Close(4503, "This room is full.")
    why = "Too many have joined from your network. Try again in a few minutes."
    check("SOCKETS_PER_ADDRESS", outbox.address, why, code=4503)
    allowance("SOCKETS_PER_ADDRESS", outbox.address).spend(1)
    name = guards.unlike_others(name, [member.name for member in others])
    hues = [member.hue for member in others]
    hue = min(range(16), key=hues.count)
    if not restarted:
        post(room, fragments.notice, name=name, what="joined")
    enter(Member(room, id, name, outbox.address, hue, outbox.allowance), outbox, after)
    if len(room.members) > limits["MEMBERS"]:  # who is lost makes way for who is here
        leave(next(member for member in others if not member.outbox), "left")


# ── Strangers ────────────────────────────────────────────────────────────────────────────────────
# They are told apart by address. The caches bound the memory: who has long done nothing is
# forgotten first.


def address_of(client) -> str:
    """Return where a request or a WebSocket comes from."""
    if client.headers.get("X-Forwarded-For") and not limits["PROXIES"]:
        note("X-Forwarded-For came, but CHAT_PROXIES is 0: all who come by that proxy count as one")
    return guards.address(client, limits["PROXIES"])


class Share(Allowance):
    """The seconds for which an address may keep us busy, WebSockets and HTTP together.

    And in one turn of the event loop nothing more is begun after a slice of that, so that others
    come in between.
    """

    def __init__(self, rate: float):
        super().__init__(rate, burst=10 * rate)
        self.slice = rate / 125  # 2 ms, if a second has 0.25
        self.in_this_turn = 0.0
        self.line = asyncio.Lock()  # who has to wait waits in line, and only the first checks again

    def use(self, seconds: float) -> None:
        self.spend(seconds)
        if not self.in_this_turn:
            later(0, self.begin_turn)
        self.in_this_turn += seconds

    def begin_turn(self) -> None:
        self.in_this_turn = 0.0


@lru_cache(10_000)
def share_of(address: str) -> Share:
    return Share(limits["SHARE"])


@asynccontextmanager
async def turn(address: str, besides: float = 0.0) -> AsyncIterator[None]:
    """Wait until an address may keep us busy; then measure for how long it does, and charge that.

    `besides` is what cannot be measured, in seconds.
    """
    share = share_of(address)
    async with share.line:
        while share.in_this_turn > share.slice or share.left() < 0:
            await asyncio.sleep(share.until_paid())  # if that is 0: until the loop's next turn
    started = time.perf_counter()
    try:
        yield
    finally:
        share.use(time.perf_counter() - started + besides)


@lru_cache(30_000)
def allowance(limit: str, address: str) -> Allowance:
    """Return what is left to an address of a limit that is good for ten minutes."""
    return Allowance(limits[limit] / 600, limits[limit])


def check(limit: str, address: str, why: str, code: int = 1008) -> None:
    """Raise Close if an address has nothing left of such a limit."""
    if allowance(limit, address).left() < 1:
        note(f"CHAT_{limit} is reached", address)
        raise Close(code, why)


def find_room(code: str, address: str) -> Room | None:
    """Return the room with this code, if there is one; Close 1008 after too many wrong codes.

    Then even for a right code, or whoever tries them all would still find the rooms. But not at an
    address that has created the room, or that has a member in it. Codes of rooms that have
    closed are not counted: a class that reloads its pages is not guessing.
    """
    room = rooms.get(code)
    if room and address in {room.creator, *(member.address for member in room.members.values())}:
        return room
    check("WRONG_CODES", address, "Too many wrong codes have been tried. Wait ten minutes.")
    if not room and code not in closed:
        allowance("WRONG_CODES", address).spend(1)
    return room


def make_way(newest: Outbox) -> None:
    """Keep the number of connections bounded: one that is in no room makes way for another.

    That may be the newest itself. With 1013: it may hold a token, and then has to come back.
    """
    mine = [outbox for outbox in outboxes if outbox.address == newest.address]
    if len(mine) > limits["SOCKETS_PER_ADDRESS"]:
        limit, candidates = "SOCKETS_PER_ADDRESS", mine
        why = "There are too many connections from your network."
    elif len(outboxes) > limits["SOCKETS"]:
        limit, candidates, why = "SOCKETS", outboxes, "This server is full. Try again later."
    else:
        return
    note(f"CHAT_{limit} is reached", newest.address)
    silent = next(outbox for outbox in candidates if not outbox.member)  # or else the newest
    del outboxes[silent]  # here, and not when it has gone: it is not to be found twice
    silent.hang_up(1013, why)


def note(what: str, who: str = "") -> None:
    """Log what happened, and how often in a minute: an attack must not fill the disk."""
    if what not in noted:
        log.info("%s%s", what, who and f", by {who}")
        later(60, note_again, what)
    noted[what] += 1


def note_again(what: str) -> None:
    times = noted.pop(what, 0)
    if times > 1:
        log.info("%s, %s times in a minute", what, times)


def forget() -> None:
    """Forget all rooms and addresses: each test begins with that."""
    for room in list(rooms.values()):
        close_room(room)
    for memory in (closed, runs, noted):
        memory.clear()
    share_of.cache_clear()
    allowance.cache_clear()


# ── Pages ────────────────────────────────────────────────────────────────────────────────────────

# Read once, at start: what a request names is looked up in here, and never on the disk.
files = guards.read_files(Path(__file__).parent / "static")
app.jinja_env.globals["static"] = lambda name: f"/static/{name}?v={files[name].version}"
app.jinja_env.globals["close_codes"] = CLOSE_CODES


@app.before_request
async def refuse_other_sites():
    """Refuse what another site's page asks for, unless a person has followed a link there.

    Before anything is counted: an image on a foreign page is not a visitor who guesses codes.
    """
    link = request.method == "GET" and request.headers.get("Sec-Fetch-Dest") == "document"
    if request.headers.get("Sec-Fetch-Site") == "cross-site" and not link:
        return "Another site may not ask for this.", 403


def is_code(text: str) -> bool:
    return len(text) == limits["CODE_LENGTH"] and set(text) <= set(ALPHABET)


def new_code() -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(limits["CODE_LENGTH"]))


@app.get("/")
async def home(title="Chat", text=None, status=200, typed="", reopen=None):
    """Show where rooms are created and joined; with a title and a text, also what went wrong."""
    page = {"title": title, "text": text, "code": new_code(), "typed": typed, "reopen": reopen}
    return await render_template("home.html", **page), status


@app.get("/join")
async def join_page():
    """Lead to a room by its code, typed in any case and with any spacing, or by a pasted link."""
    typed = request.args.get("code", "")[-200:].strip().rstrip("/").rsplit("/", 1)[-1]
    code = re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", typed)).upper()
    if is_code(code):
        return redirect(f"/r/{code}", 303)
    text = f"A code has {limits['CODE_LENGTH']} letters and digits, without 0, O, 1, I and L."
    return await home("That is not a code", text, 400, typed=code[:40])


@app.post("/r/<code>")
async def create(code: str):
    """Open the room whose code the home page chose: a proxy can tell rooms apart by the path."""
    if not is_code(code):
        return await home("That is not a code", "Create a room to get one.", 409)
    create_room(code, address_of(request))
    return redirect(f"/r/{code}", 303)


@app.get("/r/<code>")
async def room_page(code: str):
    if code != code.upper() and is_code(code.upper()):
        return redirect(f"/r/{code.upper()}", 303)
    if find_room(code, address_of(request)):
        here = link(code)
        page = {"code": code, "limits": limits, "link": here, "alone": only_here(here)}
        return await render_template("room.html", **page)
    text = "It has not been opened yet, or its last member has left. Is this the right code?"
    reopen = code if is_code(code) else None
    return await home("There is no such room", text, 404, typed=code[:40], reopen=reopen)


def link(code: str) -> str:
    """Return the link of a room for others: to them, `localhost` would be their own machine."""
    site = f"{guards.scheme(request, limits['PROXIES'])}://{request.headers.get('Host', '')}"
    if only_here(site):
        site = limits.get("NETWORK", site)  # as main has found it out, if we listen to all
    return f"{site}/r/{code}"


def only_here(url: str) -> bool:
    """Whether a URL leads somewhere on this machine only."""
    return bool(re.match(r"https?://(localhost|127\.0\.0\.1|\[::1\])([:/]|$)", url))


@app.get("/r/<code>/qr.svg")
async def qr_code(code: str):
    """Draw the link of a room, for phones to read, and for a projector to show to a class."""
    if not find_room(code, address_of(request)):
        raise NotFound
    return draw(link(code)), {"Content-Type": "image/svg+xml"}


@lru_cache(64)
def draw(url: str) -> bytes:
    drawing = io.BytesIO()
    segno.make(url, micro=False).save(
        drawing, kind="svg", xmldecl=False, omitsize=True, light="white"
    )
    return drawing.getvalue()


@app.get("/static/<path:name>")
async def static_file(name: str):
    if name not in files:
        raise NotFound
    return files[name].response()


@app.get("/healthz")
async def healthz():
    """Count, without codes or names."""
    members = sum(len(room.members) for room in rooms.values())
    return {"rooms": len(rooms), "members": members, "connections": len(outboxes)}


# Quart would log the path as well, and with it the code.
app.log_exception = lambda error: log.error("A request failed", exc_info=error)


@app.errorhandler(Close)
async def refusal_page(close: Close):
    """Say on a page what a WebSocket says with its close: there are limits on both ways."""
    return await home("Sorry", close.reason, 503 if close.code == 4503 else 429)


@app.errorhandler(HTTPException)
async def error_page(error: HTTPException):
    if not has_request_context():  # a WebSocket that leads nowhere
        return error.description, error.code
    return await home(error.name, error.description, error.code)


# ── Start and stop ───────────────────────────────────────────────────────────────────────────────


async def run(listener: socket.socket, first: str = "") -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; then tell everybody 1012: come back in a moment."""
    loop = asyncio.get_running_loop()
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
        signal.signal(getattr(signal, name), lambda *_: loop.call_soon_threadsafe(stopping.set))

    async def stopped() -> None:
        with listener:  # of which Hypercorn has a copy
            listener.listen(1024)  # so many may wait, see config.backlog
        await stopping.wait()
        later(4, os._exit, 0)  # the last resort: a peer that never reads blocks a close
        for outbox in outboxes:
            outbox.hang_up(1012, RESTART)
        deadline = time.monotonic() + 1
        while outboxes and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    if first:  # the one that the terminal shows: it waits longer for its first member
        create_room(first).unentered.cancel()
    heart = asyncio.create_task(beat())
    # One peer may have so many connections; a proxy is no stranger, and has limits of its own.
    most = 0 if limits["PROXIES"] else 2 * limits["SOCKETS_PER_ADDRESS"]
    guards.install(app, lambda: Allowance(10, 60), most, lambda peer: turn(peer, CONNECTION))
    config = Config()
    config.bind = [f"fd://{listener.dup().detach()}"]
    config.backlog = 16  # asyncio accepts so many in one turn of the loop: a thousand would stop it
    config.websocket_max_message_size = largest_frame()
    config.loglevel, config.include_server_header = "WARNING", False
    await serve(app, config, shutdown_trigger=stopped)
    heart.cancel()


async def beat() -> None:
    """Send everybody a heartbeat, which silent pages answer: who stays silent is lost, see receive.

    It tells a browser an idle room from a dead line. The server sets the pace, because the timers
    of a hidden tab stand still.
    """
    while True:
        await asyncio.sleep(limits["BEAT"])
        batch = [str(fragments.beat())]
        for number, outbox in enumerate(list(outboxes)):
            try:
                send(outbox, batch)
            except Exception:  # or the heart would stand still for all
                log.exception("A heartbeat failed")
                evict(outbox, "The server has made a mistake. Come back and resume.")
            if number % OUTBOXES_AT_ONCE == 0:
                await asyncio.sleep(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A room chat on WebSockets.",
        epilog="settings, in the environment:\n"
        + "\n".join(
            f"  CHAT_{name} ({default or 'not set'}): {what}"
            for name, (default, what) in SETTINGS.items()
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0: everywhere")
    parser.add_argument("--port", default=8000, type=int)
    options = parser.parse_args()
    host, port = options.host, options.port
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    for name in os.environ:
        if name.startswith("CHAT_") and name.removeprefix("CHAT_") not in SETTINGS:
            log.warning("%s, in the environment, is not a setting.", name)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = host == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except (OSError, OverflowError) as why:
        reason = str(getattr(why, "strerror", why)).split(" (")[0]
        sys.exit(f"Cannot listen on {host}, port {port}: {reason}.")
    guards.harden(listener)
    if (most := guards.raise_open_files()) < limits["SOCKETS"] + 100:
        log.warning("The system allows %s open files, fewer than CHAT_SOCKETS need.", most)
    shown = network_address() if host in ("0.0.0.0", "::") else host
    shown = f"[{shown}]" if ":" in shown else shown
    site = f"http://{shown}:{listener.getsockname()[1]}"
    print(f"Chat is on {site} (Ctrl-C stops it)", flush=True)
    first = ""
    if host in ("0.0.0.0", "::"):
        limits["NETWORK"], first = site, new_code()
        print(f"One room for the phones in this network: {site}/r/{first}", flush=True)
        with suppress(UnicodeEncodeError):  # a terminal that has no blocks
            segno.make(f"{site}/r/{first}", micro=False).terminal(compact=True)
    asyncio.run(run(listener, first))


def network_address() -> str:
    """Return the address under which others in the same network reach this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # asks for the route there, sends nothing
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


if __name__ == "__main__":
    main()
