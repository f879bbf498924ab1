# /// script
# requires-python = ">=3.11, <3.14"
# dependencies = [  # as in requirements.txt
#     "quart==0.22.0", "hypercorn==0.18.0", "wsproto==1.3.2", "h11==0.16.0", "h2==4.4.1",
#     "werkzeug==3.1.9", "flask==3.1.3", "jinja2==3.1.6", "itsdangerous==2.2.0",
#     "markupsafe==3.0.4", "segno==1.6.6",
# ]
# ///
"""A room chat on WebSockets: rooms, fan-out, delivery and pages.

    pip install -r requirements.txt
    python chat.py                  # then open http://127.0.0.1:8000 in two tabs

The path of a message. Only its two ends await; in the middle are plain functions, and while one of
them runs, nothing else does:

    browser ─frame─▶ receive ─▶ post ─▶ room.pending ─▶ hand_out ─▶ outboxes ─▶ relay ─frame─▶ browsers
                     (await)    (def)                   (def)       (queues)    (await)

The words:

    room     people who talk, found by a code such as KWR4TN; gone when the last member has left,
             or if nobody enters
    member   one tab in one room: here (has an outbox), lost, and perhaps reconnecting (has none), or
             left (forgotten)
    host     who has been in the room longest: can lock it, and remove somebody
    entry    a line of the log, message or notice; its seq is one more than that of the entry before
    frame    what a WebSocket carries: JSON from the browser, fragments of HTML to it
    outbox   the frames that one connection still has to be sent; bounded, so that nobody waits for
             the slow
    hand out to put all that is pending in a room into the outboxes of its members
    snapshot what a member is given when it enters: what was handed out since the entry that it has
             seen last (new: all), as far as it is remembered. To come back to that is to resume
    token    signed proof of having been in a room; comes with the snapshot, is shown to come back
    evict    to hang up on a member that is too slow; it comes back by itself, and resumes
    echo     a member's own message, as it comes back to it like to all others
    turn     of each address one frame or request at a time is worked on, and the others wait in
             line; the address pays for the time that it takes
"""

import argparse
import asyncio
import hmac
import json
import logging
import math
import os
import random
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
from contextvars import Context
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

try:
    import segno
    from hypercorn.asyncio import serve
    from hypercorn.config import Config
    from itsdangerous import BadSignature, URLSafeSerializer
    from quart import Quart, redirect, render_template, request, websocket
    from werkzeug.exceptions import HTTPException

    import guards
    from guards import Allowance
except ImportError as missing:  # a package, or in a package something that guards.py needs
    sys.exit(f"{missing.msg}. Install what is needed: pip install -r requirements.txt")

# ── Limits ───────────────────────────────────────────────────────────────────────────────────────

SETTINGS = {  # in the environment, as in CHAT_MEMBERS=40: the default, and what it limits
    "MESSAGE_LENGTH": (2_000, "characters of a message"),
    "RATE": (2.0, "frames a second of one member; more are read later"),
    "BURST": (20, "frames at once; each KiB of one, and of the HTML made of it, counts as one"),
    "SHARE": (0.25, "share of the server's time that one address may take; then it waits"),
    "MEMBERS": (250, "members of a room"),
    "SOCKETS": (2_000, "connections in all"),
    "SOCKETS_PER_ADDRESS": (250, "connections of one address; also, how many join in ten minutes"),
    "ROOMS": (1_000, "rooms"),
    "NEW_ROOMS": (30, "rooms that one address can create at once, and again in ten minutes"),
    "WRONG_CODES": (60, "wrong codes from one address at once, and again in ten minutes"),
    "CODE_LENGTH": (6, "characters of a room code; 8 on the open internet"),
    "HISTORY": (200, "messages that a room remembers"),
    "HISTORY_BYTES": (65_536, "bytes that these may take"),
    "OUTBOX_BYTES": (98_304, "bytes that may wait for one slow member, beside its snapshot"),
    "FRAMES_PER_SECOND": (13_000, "the pace of a room: frames to all its members together"),
    "BEAT": (20.0, "seconds between heartbeats, at most; silent for 2.5 times that is lost"),
    "GRACE": (120.0, "seconds to come back after losing the connection: phones freeze tabs"),
    "PROXIES": (0, "proxies in front, whose X-Forwarded-For and -Proto are believed"),
    "ORIGINS": ("", "other origins whose pages may connect, with commas between them"),
    "SECRET": ("", "signs the tokens, at least 16 characters; empty: a new one at each start"),
}
JOIN_DEADLINE = 10  # seconds to say hello; for each frame after the first it is 2.5 BEAT
GRACE_CLOSED = 5  # seconds to come back after closing the page: a reload is no leaving
UNENTERED = 600  # seconds that a room waits for its first member
ALPHABET = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"  # of room codes, which are read out: no 0 O 1 I L
ID = re.compile("[A-Za-z0-9_-]{1,64}")  # of a message
ONLY_HERE = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])([:/]|$)")  # on this machine
NOTICES_REMEMBERED = 30  # of a room
IDS_REMEMBERED = 128  # of each member's messages; our page, which waits for each echo, needs one
FRAME_SIZE = 16_384  # characters of a frame of a snapshot; a hand-out is one frame of any size
DOUBLE_WORK = 262_144  # a frame of so many characters takes twice as long to send as a short one
OUTBOXES_AT_ONCE = 50  # to send to so many takes about 2 ms
NAMES_PER_SECOND = 500  # in lists of members, shown to one member
PENDING_BYTES = 81_920  # while more is pending in a room, what its members say has to wait
HANDSHAKE = 0.0005  # seconds that one takes, most of them in Hypercorn: its address pays for them

# The codes with which connections end, what they mean, and whether the page comes back by itself.
# To what breaks the protocol of WebSockets itself, wsproto answers with 1002 or 1007.
CLOSE_CODES = {
    1000: ("you left", "no"),
    1008: ("you broke a rule, the reason says which", "no"),
    1009: ("that frame was too large", "no"),
    1011: ("the server has made a mistake", "yes"),
    1012: ("the server restarts", "yes"),
    1013: ("you were too slow or silent, a limit is reached, or we made a mistake", "yes"),
    4401: ("this token is not for this room", "no, give a name again"),
    4403: ("you have been removed, or the room is locked", "no"),
    4404: ("there is no such room, or it has closed", "no"),
    4409: ("you opened this chat in another tab", "no, it goes on there"),
    4503: ("the room or the server is full, or too many of your network have joined", "no"),
}


class Close(HTTPException):
    """Ends a connection, or is shown as a page. Has one of these codes, and a reason to read."""

    def __init__(self, code: int, reason: str):
        self.code, self.reason = code, reason
        super().__init__(reason)  # for error_page


class Chat(Quart):
    async def handle_request(self, request):
        """Answer a request by HTTP when it is the turn of its address."""
        async with turn(address_of(request)):
            response = await super().handle_request(request)
        response.headers.setdefault("Cache-Control", "no-store")
        return response


app = Chat(__name__, static_folder=None)
app.url_map.merge_slashes = False  # or `//` would be answered with a redirect to any Host
app.url_map.strict_slashes = False  # a link to a room may end with one
limits = {}  # the settings as they are (and NETWORK, see main)

for name, (default, _) in SETTINGS.items():
    kind, told = type(default), os.environ.get(f"CHAT_{name}", default)
    try:
        value = limits[name] = kind(told)
        fine = kind is str or 0 < value < math.inf or value == default  # that of PROXIES is 0
    except ValueError:
        fine = False
    if not fine:
        number = "a whole number" if kind is int else "a number"
        print(f"CHAT_{name} has to be {number} above 0, not {told!r}.", file=sys.stderr)
        sys.exit(2)  # deploy/chat.service knows by this that to try again does not help
if 0 < len(limits["SECRET"]) < 16:
    print("CHAT_SECRET has to have 16 characters or more, or it can be guessed.", file=sys.stderr)
    sys.exit(2)

LARGEST_FRAME = 8 * limits["MESSAGE_LENGTH"] + 384  # bytes; our page takes 6 a character at most
SECRET = limits["SECRET"] or secrets.token_hex()
signer = URLSafeSerializer(SECRET, salt="member")  # of tokens


# ── State ── rooms and outboxes ──────────────────────────────────────────────────────────────────


class Outbox(asyncio.Queue):
    """What one connection still has to be sent, and what else we know of that connection.

    In it are frames, those of a snapshot as one thing, and perhaps a Close: the end.
    """

    def __init__(self, address: str):
        super().__init__()  # without a bound of its own: send counts bytes
        self.address = address
        self.member: Member | None = None  # set by enter
        self.bytes = 0  # of the frames that wait, without a snapshot's
        # How many frames the browser may send; when it has entered, its member's. A frame that costs
        # more than is left has to wait until that is paid.
        self.allowance = Allowance(limits["RATE"], limits["BURST"])
        self.deadline = time.monotonic() + JOIN_DEADLINE  # for a hello, then for each next frame
        self.next_beat = later(min(limits["BEAT"], JOIN_DEADLINE), beat, self)
        self.grace = limits["GRACE"]  # seconds to come back if it ends now
        self.end: Close | None = None  # set by hang_up: then what it says has no effect any more


@dataclass(eq=False, slots=True)
class Member:
    room: "Room"
    id: str  # public, stands in every message; unlike a token, or the key in a hello, no proof
    name: str
    address: str  # of its latest connection
    hue: int  # of its name, 0 to 15: the least used in its room
    allowance: Allowance  # kept when it comes back: else coming back would refill it
    outbox: Outbox | None = None  # None while it is lost
    leaving: asyncio.TimerHandle | None = None  # set by lose: if it is back before, it never left
    posted: deque[int] = field(default_factory=lambda: deque(maxlen=IDS_REMEMBERED))  # hashed


@dataclass(eq=False, slots=True)
class Room:
    code: str
    creator: str  # address of who has opened it; empty: main has
    # The seq with which it began, which is the time of that in milliseconds. Its tokens have it, so that
    # they are not good for a later room with this code.
    start: int
    seq: int  # of the latest entry
    handed_out: int  # seq of the latest entry that is not pending
    forgotten: int  # no message up to this seq is in the history any more
    members: dict[str, Member] = field(default_factory=dict)  # the first is the host
    history: deque[tuple[int, str]] = field(default_factory=deque)  # messages with their seqs
    history_bytes: int = 0
    # Notices are kept apart, so that they push no message out.
    notices: deque[tuple[int, str]] = field(
        default_factory=lambda: deque(maxlen=NOTICES_REMEMBERED)
    )
    pending: str = ""  # the next frame: fragments that are in no outbox yet
    delivering: bool = False  # whether the frame before is still on its way to some outboxes
    rests_until: float = 0.0  # as time.monotonic says it; then hand_out, if something is pending
    presence: asyncio.TimerHandle | None = None  # set if the list of members has changed
    locked: bool = False
    removed: set[str] = field(default_factory=set)  # ids of members who may not come back


rooms: dict[str, Room] = {}
outboxes: dict[Outbox, None] = {}  # of connections, oldest first; see make_way
RUN = secrets.token_hex(4)  # names this run of the program, in its tokens
runs_seen: dict[str, float] = {}  # when each run first showed up in a token; see come_back
stopping = asyncio.Event()
RESTART, REMOVED = "The server restarts.", "The host has removed you from this room."
MISTAKE = "The server has made a mistake. Come back and resume."

log = logging.getLogger("chat")  # is told no message, name, room code or token
noted: Counter[str] = Counter()  # what has happened in the last minute, and how often

# Each macro of fragments.html becomes a function. They are called where nothing may await, so the
# template engine is one that does not.
fragments = app.jinja_env.overlay(enable_async=False).get_template("fragments.html").module


def later(seconds: float, call, *arguments) -> asyncio.TimerHandle:
    """Set a timer. In an empty context, or it would keep alive the request in which it is set."""
    return asyncio.get_running_loop().call_later(seconds, call, *arguments, context=Context())


# ── Fan-out ──────────────────────────────────────────────────────────────────────────────────────
# One event loop runs everything, and it changes from one task to another only at an await. These
# functions have none, so each of them happens as a whole, and none of them needs a lock.


def post(room: Room, macro, **values) -> int:
    """Give an entry the room's next number, render it once for everybody, and have it sent.

    Return its size in bytes.
    """
    room.seq += 1
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = str(macro(seq=room.seq, time=now, **values))
    if macro is fragments.notice:
        room.notices.append((room.seq, entry))
    else:
        room.history.append((room.seq, entry))
        room.history_bytes += sys.getsizeof(entry)
        while len(room.history) > limits["HISTORY"] or (
            room.history_bytes > limits["HISTORY_BYTES"] and len(room.history) > 1
        ):
            room.forgotten, dropped = room.history.popleft()
            room.history_bytes -= sys.getsizeof(dropped)
    wake(room, entry)
    return sys.getsizeof(entry)


def wake(room: Room, fragment: str) -> None:
    """Have a fragment handed out: when the room has rested, or in the loop's next pass if it has.

    Not at once, so that ten messages that arrive together go out together.
    """
    if not room.pending:  # else the timer is set
        later(room.rests_until - time.monotonic(), hand_out, room)
    room.pending += fragment


def hand_out(room: Room) -> None:
    """Put all that is pending into the members' outboxes; then let the room rest while it is sent.

    A busy room thus sends fewer and larger frames, so that it does not fall behind: a frame costs a
    wake-up and a system call, however little is in it.
    """
    if room.delivering:  # or who is served last would get this frame before the earlier one
        later(0, hand_out, room)
        return
    frame, room.pending = room.pending, ""
    room.handed_out = room.seq
    receivers = [member.outbox for member in room.members.values() if member.outbox]
    work = len(receivers) * (1 + len(frame) / DOUBLE_WORK)  # in short frames
    room.rests_until = time.monotonic() + work / limits["FRAMES_PER_SECOND"]
    deliver(room, frame, receivers)


def deliver(room: Room, frame: str, receivers: list[Outbox]) -> None:
    """Put a frame into outboxes, a few in each pass of the loop: to send to all may take long.

    Who enters in between is no receiver, but has it in the snapshot: it is `handed_out`.
    """
    first, others = receivers[:OUTBOXES_AT_ONCE], receivers[OUTBOXES_AT_ONCE:]
    room.delivering = bool(others)
    if others:
        later(0, deliver, room, frame, others)
    try:
        for outbox in first:
            send(outbox, frame)
    except Exception:  # some have it now, and others not: all these resume
        log.exception("A hand-out failed")
        for outbox in first:
            hang_up(outbox, 1013, MISTAKE)


def send(outbox: Outbox, frame: str) -> None:
    """Put a frame into an outbox; if that is full, evict its member rather than wait.

    Waiting would make the room as slow as its slowest member, and without a bound one dead phone
    would eat the memory. Into an empty outbox any frame goes: else a large one never could.
    """
    if outbox.end:
        return  # nothing follows it
    size = sys.getsizeof(frame)
    if outbox.bytes and outbox.bytes + size > limits["OUTBOX_BYTES"]:
        while not outbox.empty():
            outbox.get_nowait()  # the next snapshot begins before these
        return hang_up(outbox, 1013, "You were too slow. Come back and resume.")
    outbox.bytes += size
    outbox.put_nowait(frame)


def hang_up(outbox: Outbox, code: int, reason: str) -> None:
    """Have the relay end a connection, after what waits; the first reason counts."""
    if not outbox.end:
        outbox.end = Close(code, reason)
        outbox.put_nowait(outbox.end)
        lose(outbox)


def show_presence(room: Room) -> None:
    """Have the list of members shown soon: it goes to all and names all, so it has its own pace."""
    if not room.presence:
        room.presence = later(len(room.members) / NAMES_PER_SECOND, add_presence, room)


def add_presence(room: Room) -> None:
    room.presence = None
    wake(room, str(fragments.presence(room)))


# ── Coming and going ─────────────────────────────────────────────────────────────────────────────


def create_room(code: str, address: str = "") -> Room:
    """Open a room for an address, or return the one that is there (a double click, a school class).

    Close: 1008 if the address has opened too many, even if the room is there (else it could find out
    in this way which codes are taken); 4503 if there are too many rooms.
    """
    why = "Your network has created many rooms. Wait a minute, and try again."
    room = rooms.get(code)
    charge(0 if room else 1, "NEW_ROOMS", address, Close(1008, why))
    if room:
        return room
    if len(rooms) >= limits["ROOMS"]:  # the oldest that nobody has entered makes way
        empty = next((each for each in rooms.values() if each.creator and not each.members), None)
        if not empty:
            raise Close(4503, "There are too many rooms. Try again later.")
        del rooms[empty.code]
    # Numbers start from the clock, in milliseconds: a room that is opened again after a restart
    # begins above its old ones, so that an old number is not mistaken for a new one.
    now = time.time_ns() // 1_000_000
    room = rooms[code] = Room(code, address, start=now, seq=now, handed_out=now, forgotten=now)
    if address:  # else it is the one that the terminal shows, and waits for ever
        later(UNENTERED, close_if_empty, code, now)
    return room


def close_if_empty(code: str, start: int) -> None:
    """Forget a room that all have left, or nobody has entered. Its timers fire to no effect."""
    room = rooms.get(code)
    if room and room.start == start and not room.members:
        del rooms[code]


def enter(member: Member, outbox: Outbox, after: int) -> None:
    """Connect a member, and give it what was said since the entry `after`, or, if it is new, all.

    To be given the snapshot and to become a receiver is one step: what has been handed out is in the
    snapshot, and what is pending comes with the next hand-out. With an await in here, an entry of that
    moment could be in both, or in neither.
    """
    room = member.room
    if member.outbox:
        hang_up(member.outbox, 4409, "You opened this chat in another tab.")
    if member.leaving:  # set by lose: in the hang_up above, or earlier
        member.leaving.cancel()
    room.members[member.id] = member
    member.outbox, member.address = outbox, outbox.address
    outbox.member, outbox.allowance = member, member.allowance
    outbox.put_nowait(in_frames(snapshot(member, after)))  # uncounted: a long one must not evict
    show_presence(room)


def snapshot(member: Member, after: int) -> list[str]:
    """Return a welcome, and what was handed out after this entry (0: whoever asks is new). If that is
    forgotten, or was in another run, a line says so, and all that is remembered follows."""
    room = member.room
    token = signer.dumps([room.code, room.start, RUN, member.id, member.name])
    # The history drops old messages when new ones are posted, handed out or not, so `forgotten` can be
    # ahead of `handed_out`. After the lesser of them no message is missing. If 101 to 320 are pending,
    # and the history has 121 to 320, then `forgotten` is 120 and `handed_out` is 100: whoever has seen
    # 100 misses nothing, as 101 to 120 are pending still.
    complete = min(room.forgotten, room.handed_out)
    parts = [str(fragments.welcome(member, token, complete))]
    if not complete <= after <= room.handed_out:  # new, away too long, or not of this room
        if after:
            parts.append(str(fragments.gap(complete, restarted=after < room.start)))
        after = complete
    entries = sorted([*room.history, *room.notices])
    return parts + [entry for seq, entry in entries if after < seq <= room.handed_out]


def lose(outbox: Outbox) -> None:
    """Let go of a connection that ends: its member leaves, if it is not back within its grace."""
    member = outbox.member
    if not member or member.outbox is not outbox:
        return  # never joined, is lost already, or has another connection by now
    member.outbox = None
    member.leaving = later(outbox.grace, leave, member, "left")
    show_presence(member.room)


def leave(member: Member, what: str) -> None:
    """Take a lost member out of its room, and close the room after the last one."""
    room = member.room
    member.leaving.cancel()
    del room.members[member.id]
    close_if_empty(room.code, room.start)  # then there is nobody to hear of it
    post(room, fragments.notice, name=member.name, what=what)
    show_presence(room)


# ── The WebSocket ────────────────────────────────────────────────────────────────────────────────


@app.before_websocket
async def handshake():
    """Charge for a handshake; refuse a page neither ours nor in CHAT_ORIGINS, and unknown paths.

    Without this, every page on the internet could connect from its visitors' browsers. A page cannot
    choose its Origin; a program has to send one, too.
    """
    allowed = limits["ORIGINS"].lower().replace(",", " ").split()
    allowed.append(guards.site(websocket, limits["PROXIES"]))
    async with turn(address_of(websocket)) as share:
        share.spend(HANDSHAKE)
        if websocket.headers.get("Origin", "").lower() not in allowed:
            note("An Origin that is neither ours nor in CHAT_ORIGINS has tried to connect")
            return "This page may not connect here.", 403
        if nowhere := websocket.routing_exception:
            return nowhere.name, nowhere.code


@app.websocket("/r/<code>/ws")
async def connection(code: str):
    """Serve one connection: receive and relay side by side, until relay has found a Close or failed.

    What fails in receive puts a Close into the outbox: a member that can still hear but no longer
    speak is worse than one that is gone. If the browser ends the connection, Quart cancels this.
    """
    ws = websocket._get_current_object()  # what `websocket` stands for, looked up once
    # Accept even whom we turn away below: browsers tell a page no code but that of a close.
    await ws.accept()
    outbox = Outbox(address_of(ws))
    outboxes[outbox] = None
    make_way(outbox)  # if it is one too many
    if stopping.is_set():
        hang_up(outbox, 1012, RESTART)
    receiving = asyncio.create_task(receive(code, outbox, ws))
    try:
        await relay(outbox, ws)
    except OSError:  # the network has given up
        pass
    except Exception:
        log.exception("A connection failed")
        await ws.close(1011, MISTAKE)
    finally:
        receiving.cancel()
        lose(outbox)
        outbox.next_beat.cancel()
        outboxes.pop(outbox, None)


async def relay(outbox: Outbox, ws) -> None:
    """Carry frames from the outbox to the socket, until there is a Close: end the connection with it.

    If it just returned, the code would be 1000, and no page would come back.
    """
    while True:
        match await outbox.get():
            case str(frame):
                outbox.bytes -= sys.getsizeof(frame)
                await ws.send(frame)
            case Close() as end:
                note(f"Closed with {end.code}: {end.reason}")
                return await ws.close(end.code, end.reason)
            case frames:  # of a snapshot
                for frame in frames:
                    await ws.send(frame)
        frames = frame = None  # or an idle relay would keep them


def in_frames(parts: list[str]) -> Iterator[str]:
    """Join fragments to frames of at most FRAME_SIZE, unless a single one is larger.

    Each is made only when it is sent: what waits in an outbox is no copy of the history.
    """
    frame = ""
    for fragment in parts:
        if frame and len(frame) + len(fragment) > FRAME_SIZE:
            yield frame
            frame = ""
        frame += fragment
    yield frame


def beat(outbox: Outbox) -> None:
    """Send a heartbeat, which the page of a member answers; hang up on who is silent.

    It lets a browser tell an idle room from a dead line. The server sets the pace, because the
    timers of a hidden tab are slow.
    """
    left = outbox.deadline - time.monotonic()
    if left <= 0:
        return hang_up(outbox, 1013, "We have waited for you for too long. Come back.")
    # At random a little earlier, or those who have come together would answer together for ever.
    pause = limits["BEAT"] * random.uniform(0.8, 1)
    outbox.next_beat = later(min(pause, left), beat, outbox)
    send(outbox, str(fragments.beat()))


async def receive(code: str, outbox: Outbox, ws) -> None:
    """Take in frame after frame, a hello first, until the connection ends.

    Who sends too much is not told so, but read more slowly: what we do not read fills the buffers
    on the way, and then TCP has the sender wait. That is backpressure.
    """
    try:
        while True:
            frame = parse(await ws.receive(), outbox.allowance)
            outbox.deadline = math.inf  # while we work on a frame, nobody is to blame for silence
            await outbox.allowance.paid()
            async with turn(outbox.address, outbox.member and outbox.member.room):
                if not outbox.end:  # else it has no effect; the page says its messages again
                    if outbox.member:
                        act(outbox.member, frame)
                    else:
                        hello(code, outbox, frame)
            frame = None  # as in relay
            outbox.deadline = time.monotonic() + 2.5 * limits["BEAT"]
    except Close as end:  # who has left, or has broken a rule, is not expected back
        outbox.grace = 0
        hang_up(outbox, end.code, end.reason)
    except Exception:
        log.exception("A connection failed")
        hang_up(outbox, 1011, MISTAKE)


def parse(raw, allowance: Allowance) -> dict:
    """Return a frame: one verb, as in {"say": …}, perhaps with an id; else Close 1008 or 1009."""
    if not isinstance(raw, str):
        raise Close(1008, "A frame has to be text.")
    size = len(raw.encode())
    if size > LARGEST_FRAME:
        raise Close(1009, f"A frame has at most {LARGEST_FRAME} bytes.")
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


def hello(code: str, outbox: Outbox, frame: dict) -> None:
    """Let somebody in. Close: 1008 if this is no hello, and as join and come_back."""
    match frame:
        case {"hello": {"name": str(name), "key": str(key)}} if len(key) >= 16:
            join(code, name, key, outbox)
        case {"hello": {"name": str(name)}}:
            join(code, name, secrets.token_hex(), outbox)
        case {"hello": {"token": str(token), "after": int(after)}}:
            come_back(code, token, after, outbox)
        case _:
            raise Close(1008, "The first frame has to be a hello.")


def act(member: Member, frame: dict) -> None:
    """Do what a member says; Close 1000 if it leaves, 1008 if that is nothing that one can say."""
    room, outbox = member.room, member.outbox
    host = member is next(iter(room.members.values()))
    outbox.grace = limits["GRACE"]  # whoever says something after a bye has not gone
    match frame:
        case {"say": str(text), "id": str(id)} if ID.fullmatch(id):
            say(member, id, text)
        case {"typing": True}:
            wake(room, str(fragments.typing(member)))  # neither numbered nor remembered
        case {"bye": True}:  # the page is closed, or reloaded
            outbox.grace = min(limits["GRACE"], GRACE_CLOSED)
        case {"leave": True}:
            raise Close(1000, "You left the room.")
        case {"lock": bool(locked)} if host and locked != room.locked:
            room.locked = locked
            what = "locked the room" if locked else "unlocked the room"
            post(room, fragments.notice, name=member.name, what=what)
            show_presence(room)
        case {"remove": str(id)} if host and id in room.members:
            other = room.members[id]
            room.removed.add(id)  # so that its token is good no more, in this run
            if other.outbox:
                hang_up(other.outbox, 4403, REMOVED)
            leave(other, "was removed")
        case {"here": int()} | {"lock": bool()} | {"remove": str()}:
            pass  # the answer to a heartbeat; or its sender is no host, or that is done already
        case _:
            raise Close(1008, "That is not a frame of this chat.")


def say(member: Member, id: str, text: str) -> None:
    """Post what a member says, once; or tell it that this had been posted, or why it cannot be."""
    hashed = hash(id)  # smaller to remember
    if hashed in member.posted:  # it is sent again, because the echo had not arrived
        mark = f'data-from="{member.id}" data-id="{id}"'  # as fragments.html writes it
        if mark not in member.room.pending:  # else the echo is still to come
            send(member.outbox, str(fragments.verdict(id, "confirmed", "")))
        return
    text = guards.clean(text)
    if not text.strip() or len(text) > limits["MESSAGE_LENGTH"]:
        why = f"A message has 1 to {limits['MESSAGE_LENGTH']} characters."
        return send(member.outbox, str(fragments.verdict(id, "refused", why)))
    pieces = guards.PIECES.split(text, maxsplit=50)  # text, code or a link, text, and so on
    size = post(member.room, fragments.message, member=member, id=id, pieces=pieces)
    member.allowance.spend(size // 1024)  # 2 KB of `&` can become 80 for everybody
    member.posted.append(hashed)


# ── Who comes in ─────────────────────────────────────────────────────────────────────────────────


def join(code: str, raw_name: str, key: str, outbox: Outbox) -> None:
    """Let somebody new into a room, or say what is wrong with the name: there can be another hello.

    Whoever says hello again with the same key, because the welcome got lost, is the same member.
    Close: as find_room and let_in.
    """
    try:
        name = guards.usable_name(raw_name)
    except ValueError as why:
        return send(outbox, str(fragments.unusable(why)))
    id = hmac.new(SECRET.encode(), key.encode(), "sha256").hexdigest()[:16]
    let_in(find_room(code, outbox.address), id, name, outbox)


def come_back(code: str, token: str, after: int, outbox: Outbox) -> None:
    """Let somebody in who was in a room before, and resume; with CHAT_SECRET also after a restart.

    Close: 4401 not a token of this room, 4404 closed, 4403 as let_in, 1013 a limit.
    """
    try:
        of_code, start, run, id, name = signer.loads(token)
    except (BadSignature, TypeError, ValueError):
        of_code = None  # forged, or signed with the secret of another start: refused just below
    room = rooms.get(code)
    # Refused: a token of another room or, in this run, of an earlier room with this code.
    if of_code != code or (room and run == RUN and start != room.start):
        raise Close(4401, "This room does not know you any more.")
    # After a restart, for a grace, a token opens its room again, and lets in without a notice.
    # The grace counts from when the room was opened again or, if it is not yet, from when we first saw
    # a token of that run. Not from our start: where each of several processes has some of the rooms, a
    # proxy brings us those of one that has died.
    now = time.time()
    since = room.start / 1000 if room else runs_seen.setdefault(run, now)
    restarted = run != RUN and now - since < limits["GRACE"]
    if not room and not restarted:
        raise Close(4404, "This room has closed.")
    try:
        room = room or create_room(code, outbox.address)
        let_in(room, id, name, outbox, after, restarted)
    except Close as close:
        # What is full, and a limit that is reached, will not be so for long: worth another try.
        raise Close(1013 if close.code in (1008, 4503) else close.code, close.reason) from None


def let_in(room: Room, id: str, name: str, outbox: Outbox, after=0, restarted=False) -> None:
    """Have a member enter that has not left, or else a new one.

    Close: 4403 it has been removed, or the room is locked; 4503 the room or the server is full, or
    too many have joined. restarted: its token is from before a recent restart; then it enters
    without a notice, locked or not.
    """
    if id in room.removed:
        raise Close(4403, REMOVED)
    if member := room.members.get(id):
        return enter(member, outbox, after)
    if room.locked and not restarted:
        raise Close(4403, "This room is locked: nobody new comes in.")
    others = list(room.members.values())
    lost = [member for member in others if not member.outbox]
    if len(others) - len(lost) >= limits["MEMBERS"]:
        raise Close(4503, "This room is full.")
    # Lost ones count, too: else to say hello and hang up, again and again, would fill the server.
    if sum(len(each.members) for each in rooms.values()) >= 2 * limits["SOCKETS"]:
        raise Close(4503, "This server is full. Try again later.")
    why = "Too many have joined from your network. Try again in a few minutes."
    charge(1, "SOCKETS_PER_ADDRESS", outbox.address, Close(4503, why))
    name = guards.unlike_others(name, [member.name for member in others])
    hues = [member.hue for member in others]
    hue = min(range(16), key=hues.count)
    if not restarted:
        post(room, fragments.notice, name=name, what="joined")
    enter(Member(room, id, name, outbox.address, hue, outbox.allowance), outbox, after)
    if len(room.members) > limits["MEMBERS"]:  # so some are lost: who would leave next does so now
        leave(min(lost, key=lambda member: member.leaving.when()), "left")


# ── Strangers ────────────────────────────────────────────────────────────────────────────────────
# They are told apart by address. What is known of an address is in caches, to bound the memory: who
# has long done nothing is forgotten first.


def address_of(client) -> str:
    """Return where a request or a WebSocket comes from."""
    if client.headers.get("X-Forwarded-For") and not limits["PROXIES"]:
        note("X-Forwarded-For came, but CHAT_PROXIES is 0: all who come by a proxy count as one")
    return guards.address(client, limits["PROXIES"])


@lru_cache(10_000)
def share_of(address: str) -> tuple[Allowance, asyncio.Lock]:
    return Allowance(rate=limits["SHARE"], burst=10 * limits["SHARE"]), asyncio.Lock()  # seconds


@asynccontextmanager
async def turn(address: str, room: Room | None = None) -> AsyncIterator[Allowance]:
    """Wait until an address may keep us busy; then measure and charge for how long it does.

    What comes from one address, by WebSocket and HTTP, waits in line, and what has taken long lets
    others go first. A frame also waits while too much is pending in its room. What is done in a turn
    never has to wait, even where it says await, so the time is this address's alone.
    """
    share, line = share_of(address)
    while True:
        async with line:
            await share.paid()
            if not room or sys.getsizeof(room.pending) <= PENDING_BYTES:
                started = time.perf_counter()
                try:
                    yield share
                finally:
                    took = time.perf_counter() - started
                    share.spend(took)
                break  # done; else another try, when the room has rested
        await asyncio.sleep(room.rests_until - time.monotonic())  # others of the address go on
    if took > limits["SHARE"] / 1_000:  # 0.25 ms by default
        await asyncio.sleep(0)  # until the event loop's next pass: others go first


@lru_cache(30_000)
def quota(limit: str, address: str) -> Allowance:
    """Return what an address has of a limit; used up, it is full again after ten minutes."""
    return Allowance(limits[limit] / 600, limits[limit])


def charge(amount: int, limit: str, address: str, refusal: Close) -> None:
    """Take 1 of what an address has of a limit, or 0; raise the refusal if none is left, for 0 too."""
    bucket = quota(limit, address)
    if bucket.left() < 1:
        note(f"CHAT_{limit} is reached", address)
        raise refusal
    bucket.spend(amount)


def find_room(code: str, address: str) -> Room:
    """Return the room with this code. Close: 4404 no such room, 1008 after too many wrong codes.

    Then right codes are refused, too: else trying them all would still find rooms. But not at an
    address that has created the room, or that has a member in it.
    """
    room = rooms.get(code)
    if room and address in {room.creator, *(member.address for member in room.members.values())}:
        return room
    why = "Too many wrong codes have been tried. Wait a few minutes."
    charge(0 if room else 1, "WRONG_CODES", address, Close(1008, why))
    if not room:
        raise Close(4404, "There is no such room. It has not been opened yet, or it has closed.")
    return room


def make_way(newest: Outbox) -> None:
    """Keep the number of connections bounded: one that has entered no room makes way for another.

    That may be the newest itself. With 1013, so that a member on its way back tries again.
    """
    mine = [outbox for outbox in outboxes if outbox.address == newest.address]
    for limit, candidates in (("SOCKETS_PER_ADDRESS", mine), ("SOCKETS", outboxes)):
        if len(candidates) > limits[limit]:
            note(f"CHAT_{limit} is reached", newest.address)
            outsider = next(outbox for outbox in candidates if not outbox.member)
            del outboxes[outsider]  # here, and not when it has gone: it is not to be found twice
            why = "There are too many connections, from your network or in all."
            return hang_up(outsider, 1013, why)


def note(what: str, who: str = "") -> None:
    """Log what happened, and how often in a minute: an attack must not fill the disk."""
    if what not in noted:
        log.info("%s%s", what, who and f", by {who}")
        later(60, note_again, what)
    noted[what] += 1


def note_again(what: str) -> None:
    if (times := noted.pop(what, 0)) > 1:
        log.info("%s, %s times in a minute", what, times)


# ── Pages ────────────────────────────────────────────────────────────────────────────────────────

# Read once, at start, each with a route of its own: no request ever names a file on the disk.
files = guards.read_files(Path(__file__).parent / "static")
for name, file in files.items():
    app.add_url_rule(f"/static/{name}", name.replace(".", "-"), file.response)
app.jinja_env.globals["static"] = lambda name: f"/static/{name}?v={files[name].version}"
app.jinja_env.globals["close_codes"] = CLOSE_CODES


@app.before_request
async def refuse_other_sites():
    """Refuse what another site's page asks for, unless a person has followed a link there.

    An image on a foreign page is not a visitor who guesses codes: this comes before they are counted.
    Browsers send these headers by HTTPS and to localhost, but not by plain HTTP in a local network.
    """
    followed = request.method == "GET" and request.headers.get("Sec-Fetch-Dest") == "document"
    if request.headers.get("Sec-Fetch-Site") == "cross-site" and not followed:
        return "Another site may not ask for this.", 403


def is_code(text: str) -> bool:
    return len(text) == limits["CODE_LENGTH"] and set(text) <= set(ALPHABET)


def new_code() -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(limits["CODE_LENGTH"]))


@app.get("/")
async def home(wrong="", status=200, typed=""):
    """Show where rooms are created and joined, and what went wrong."""
    page = {"wrong": wrong, "typed": typed, "a_code": is_code(typed), "code": new_code()}
    return await render_template("home.html", **page), status


@app.get("/join")
async def join_page():
    """Lead to a room by its code, typed in any case and with any spacing, or by a pasted link."""
    typed = re.split("[?#]", request.args.get("code", "")[:200])[0]  # some apps add to a link
    _, _, typed = typed.strip().rstrip("/").rpartition("/")  # of a link, the end
    code = re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", typed)).upper()
    if is_code(code):
        return redirect(f"/r/{code}", 303)
    return await home("That is not a code. Please look at it again.", 400, code[:40])


@app.post("/r/<code>")
async def create(code: str):
    """Open the room of the path, made up by the home page: a proxy can choose a process by that."""
    if not is_code(code):
        return await home("That is not a code. Create a room to get one.", 409)
    create_room(code, address_of(request))
    return redirect(f"/r/{code}", 303)


@app.get("/r/<code>")
async def room_page(code: str):
    if code != code.upper() and is_code(code.upper()):
        return redirect(f"/r/{code.upper()}", 303)
    find_room(code, address_of(request))
    site = guards.site(request, limits["PROXIES"])
    if ONLY_HERE.match(site):  # to others, `localhost` would be their own machine
        site = limits.get("NETWORK", site)  # as main has found it out, if we listen to all
    link = f"{site}/r/{code}"
    qr = segno.make(link, micro=False, mask=0)  # to find the best of the masks takes 6 ms
    page = {"link": link, "qr": qr.svg_inline(omitsize=True, light="white")}
    page |= {"code": code, "limits": limits, "alone": ONLY_HERE.match(site)}
    return await render_template("room.html", **page)


@app.get("/healthz")
async def healthz():
    """Count, without codes or names."""
    members = sum(len(room.members) for room in rooms.values())
    return {"rooms": len(rooms), "members": members, "connections": len(outboxes)}


# Quart would log the path as well, and with it the code.
app.log_exception = lambda error: log.error("A request failed", exc_info=error)


@app.errorhandler(HTTPException)
async def error_page(error: HTTPException):
    """Say on a page what went wrong; a Close, which ends a WebSocket, says it here, too."""
    status = {1008: 429, 4404: 404, 4503: 503}.get(error.code, error.code)
    typed = (request.view_args or {}).get("code", "")
    return await home(error.description, status, typed[:40])


# ── Start and stop ───────────────────────────────────────────────────────────────────────────────


async def run(listener: socket.socket) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; then tell everybody 1012: come back in a moment."""
    loop = asyncio.get_running_loop()
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
        signal.signal(getattr(signal, name), lambda *_: loop.call_soon_threadsafe(stopping.set))

    async def stopped() -> None:
        """Wait for the end; Hypercorn calls this when it listens, and stops when it returns."""
        with listener:  # Hypercorn has a copy, see below
            listener.listen(1024)  # so many may wait; Hypercorn had set 4, see config.backlog
        await stopping.wait()
        later(4, os._exit, 0)  # the last resort: a peer that never reads blocks a close
        for outbox in list(outboxes):
            hang_up(outbox, 1012, RESTART)

    # So many connections one peer may have; a proxy is no stranger, and has limits of its own.
    guards.install(app, math.inf if limits["PROXIES"] else 2 * limits["SOCKETS_PER_ADDRESS"])
    config = Config()
    config.bind = [f"fd://{listener.dup().detach()}"]
    config.backlog = 4  # asyncio accepts so many in one pass of the loop: a thousand would stop it
    config.websocket_max_message_size = LARGEST_FRAME
    config.loglevel, config.include_server_header = "WARNING", False
    await serve(app, config, shutdown_trigger=stopped)


def main() -> None:
    about = "A room chat on WebSockets. Its settings, in the environment:"
    for name, (default, what) in SETTINGS.items():
        about += f"\n  CHAT_{name} ({default or 'not set'}): {what}"
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
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
        reason = str(getattr(why, "strerror", why)).split(" (")[0]  # not the address again
        sys.exit(f"Cannot listen on {host}, port {port}: {reason}.")
    guards.harden(listener)
    everywhere = host in ("0.0.0.0", "::")
    shown = network_address() if everywhere else host
    shown = f"[{shown}]" if ":" in shown else shown
    site = f"http://{shown}:{listener.getsockname()[1]}"
    print(f"Chat is on {site} (Ctrl-C stops it)", flush=True)
    if everywhere:
        limits["NETWORK"] = site
        first = create_room(new_code()).code
        print(f"One room for the phones in this network: {site}/r/{first}", flush=True)
        with suppress(UnicodeEncodeError):  # a terminal that has no blocks
            segno.make(f"{site}/r/{first}", micro=False).terminal(compact=True)
    asyncio.run(run(listener))


def network_address() -> str:
    """Return how others in the same network reach this machine: by this address, or else name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # asks for the route there, sends nothing
        return probe.getsockname()[0]
    return socket.gethostname()


if __name__ == "__main__":
    main()
