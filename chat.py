"""A room chat on WebSockets: rooms, fan-out, delivery and pages, all of it in this file.

    pip install -r requirements.txt
    python chat.py                  # then open http://127.0.0.1:8000 in two tabs

The path of a message. Only its two ends await, so that nothing can interleave in the middle:

    browser ─frame─▶ receive ─▶ post ─▶ room.pending ─▶ flush ─▶ outboxes ─▶ relay ─frame─▶ browsers
                     (await)    (def)                (one a room) (queues)  (await)

The words:

    room     people who talk, found by a code such as KWR4TN; gone when the last member has left
    member   one tab in one room: here (has an outbox), reconnecting (has none) or left (forgotten)
    entry    a line of the log, message or notice; its seq is one more than that of the entry before
    outbox   what one connection still has to be sent; bounded, so that nobody waits for a slow one
    batch    a list of strings that a flush puts into all outboxes, the same list for all
    evict    to end a slow consumer's connection; it comes back by itself and resumes
    frame    what a WebSocket carries: JSON from the browser, fragments of HTML to it
"""

import argparse
import asyncio
import io
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import time
import unicodedata
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import suppress
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
    from werkzeug.exceptions import HTTPException, NotFound

    import guards
except ModuleNotFoundError as missing:
    sys.exit(f"The package {missing.name} is missing. Install it: pip install -r requirements.txt")
except ImportError as moved:  # something that guards.py needs
    sys.exit(f"{moved.msg}. Install the right version: pip install -r requirements.txt")

# ── Limits ── each can be set in the environment, as in CHAT_MEMBERS=40 python chat.py ───────────

app = Quart(__name__, static_folder=None)
app.url_map.merge_slashes = False  # or `//` would be answered with a redirect to any Host
limits = app.config
SETTINGS = {  # the default, and what it limits
    "MESSAGE_LENGTH": (2_000, "characters of a message"),
    "MESSAGE_RATE": (2, "messages a second and member; after too many more, 1008"),
    "MESSAGE_BURST": (10, "messages at once, before that rate counts"),
    "FRAME_BYTES": (16_384, "bytes of a frame from a browser: 8 for each character of a message"),
    "FRAME_RATE": (10, "frames of any kind a second and connection; after more, 1008"),
    "FRAME_BURST": (60, "frames at once, before that rate counts"),
    "NAME_LENGTH": (24, "characters of a name"),
    "MEMBERS": (250, "members of a room"),
    "SOCKETS": (2_000, "connections in all"),
    "SOCKETS_PER_ADDRESS": (250, "connections, and members, of one address: a class has one"),
    "ROOMS": (1_000, "rooms"),
    "NEW_ROOM_RATE": (10, "rooms that one address can create in a minute"),
    "NEW_ROOM_BURST": (30, "rooms at once, before that rate counts"),
    "WRONG_CODES": (10, "wrong codes in ten minutes from one address"),
    "WRONG_CODES_IN_ALL": (100, "wrong codes in a minute from all addresses together"),
    "HISTORY": (200, "entries that a room remembers"),
    "HISTORY_BYTES": (262_144, "bytes that these entries may take"),
    "TALK_BYTES": (33_554_432, "bytes of all histories; with many rooms each has its share"),
    "OUTBOX": (64, "batches that may wait for one slow member; and twice its room's history"),
    "FRAMES_PER_SECOND": (12_000, "the pace of a room: frames to all its members together"),
    "JOIN_DEADLINE": (10, "seconds to say a usable hello"),
    "BEAT": (20, "seconds from one heartbeat to the next"),
    "SILENCE": (50, "seconds without a frame until a connection counts as lost"),
    "GRACE_CLOSED": (5, "seconds to come back after closing the page: a reload is no leaving"),
    "GRACE_LOST": (120, "seconds to come back after losing the connection: phones freeze tabs"),
    "UNENTERED": (600, "seconds that a room waits for its first member"),
    "BODY_BYTES": (16_384, "bytes of an HTTP request's body"),
    "PROXIES": (0, "proxies in front, whose X-Forwarded-For and -Proto are believed"),
    "ORIGINS": ("", "other origins whose pages may connect, with commas between them"),
    "SECRET": ("", "signs the tokens; empty: a new one at each start, and nobody can come back"),
}
limits.from_mapping({name: default for name, (default, _) in SETTINGS.items()})
limits.from_prefixed_env("CHAT")
for name in ("ORIGINS", "SECRET"):  # as they are, and not as JSON
    limits[name] = os.environ.get(f"CHAT_{name}", "")
limits["SECRET"] = limits["SECRET"] or secrets.token_hex()
limits["MAX_CONTENT_LENGTH"] = limits["BODY_BYTES"]  # what Quart calls it
limits["BODY_TIMEOUT"] = limits["JOIN_DEADLINE"]

files = guards.read_files(Path(__file__).parent / "static")
app.jinja_env.globals["static"] = lambda name: f"/static/{name}?v={files[name].version}"

log = logging.getLogger("chat")  # closes, limits reached, errors; no message, name, code or token
RUN = secrets.token_hex(4)  # this run of the program; a token that names another is older
ALPHABET = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"  # of room codes, which are read out: no 0 O 1 I L
CODE = re.compile(f"[{ALPHABET}]{{6}}")
ID = re.compile("[A-Za-z0-9_-]{1,64}")
IDS_REMEMBERED = 128  # in a room, and 64 more a member: our page has one unconfirmed at a time
# Characters of a frame to browsers, about. A stuck line holds one, so that they are bounded; one that
# goes to all members is held only once, and may be larger: few large frames are fast.
FRAME_SIZE, FRAME_SIZE_FOR_ALL = 32_768, 131_072
# Never shown: control characters, and overrides of the writing direction. In names also refused:
# letters that look like nothing, and joiners but for those inside 👩‍🚀 or a Persian word.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
BLANK = re.compile("[\u3164\u115f\u1160\uffa0\u2800\u034f\u17b4\u17b5\ufffc\U00016fe4\U0001d159]")
JOINER = re.compile("(?<=[^\x00-\x7f])[\u200c\u200d](?=[^\x00-\x7f])")
PIECES = re.compile(  # code blocks, code and links: re.split puts them at the odd indices
    r"""(```.*?```\n?|`[^`\n]+`|https?://[^\s<>"]*[^\s<>"'.,;:!?)\]}])""", re.DOTALL
)


CLOSE_CODES = {  # what they mean, and whether the page comes back by itself
    1000: ("you left", "no"),
    1008: ("you broke a rule, the reason says which", "no"),
    1009: ("that frame was too large", "no"),
    1011: ("the server has made a mistake", "yes"),
    1012: ("the server restarts", "yes"),
    1013: ("you were too slow or silent, or did not say hello in time", "yes, and resume"),
    4401: ("this token is not for this room", "no, give a name again"),
    4403: ("you have been removed, or the room is locked", "no"),
    4404: ("there is no such room, or it has closed", "no"),
    4409: ("you opened this chat in another tab", "no, it goes on there"),
    4503: ("the room or the server is full", "no"),
}
app.jinja_env.globals["close_codes"] = CLOSE_CODES


class Close(Exception):
    """Ends a connection. Has one of these codes, and a reason for a person."""


class Allowance:
    """Counts events: so many at once as `burst` says, then `rate` a second.

    This is the token bucket: it fills by the rate, and every event takes one out.
    """

    __slots__ = "burst", "checked", "rate", "tokens"

    def __init__(self, rate: float, burst: float):
        self.rate, self.burst = rate, burst
        self.tokens, self.checked = burst, time.monotonic()

    def has(self) -> bool:
        now = time.monotonic()
        self.tokens = min(self.burst, self.tokens + (now - self.checked) * self.rate)
        self.checked = now
        return self.tokens >= 1

    def take(self) -> bool:
        allowed = self.has()
        self.tokens -= allowed
        return allowed


def allowance(limit: str, seconds: float = 1) -> Allowance:
    """Return the allowance of a limit that has a BURST, and a RATE for so many seconds."""
    return Allowance(limits[f"{limit}_RATE"] / seconds, limits[f"{limit}_BURST"])


# ── State ── all of it; only the functions of the next part change it ────────────────────────────


class Outbox(asyncio.Queue):
    """Batches, which are lists of strings. Full by number, and by what their strings take."""

    def __init__(self):
        super().__init__(limits["OUTBOX"])
        self.bytes = 0

    def _put(self, batch: list) -> None:
        self.bytes += sum(map(sys.getsizeof, batch))
        super()._put(batch)

    def _get(self) -> list:
        batch = super()._get()
        self.bytes -= sum(map(sys.getsizeof, batch))
        return batch

    def full(self) -> bool:
        return super().full() or self.bytes > 2 * share()


@dataclass(eq=False, slots=True)
class Member:
    id: str  # public, stands in every message; says nothing about the token
    name: str
    token: str  # proves, after a lost connection or a restart, that this is the same member
    address: str
    outbox: Outbox | None = None  # None while reconnecting
    skip: int = 0  # so many of room.pending are in the snapshot that it was given
    grace: asyncio.TimerHandle | None = None  # runs while reconnecting
    messages: Allowance = field(default_factory=lambda: allowance("MESSAGE"))
    refusals: Allowance = field(default_factory=lambda: allowance("MESSAGE"))


@dataclass(eq=False, slots=True)
class Room:
    code: str
    unentered: asyncio.TimerHandle  # closes the room unless somebody enters
    seq: int  # of the latest entry
    members: dict[str, Member] = field(default_factory=dict)
    history: deque[tuple[int, str]] = field(default_factory=deque)
    history_bytes: int = 0
    pending: list[str] = field(default_factory=list)  # posted, but in no outbox yet
    posted: OrderedDict = field(default_factory=OrderedDict)  # hashes of (member, id), oldest first
    typing: set[Member] = field(default_factory=set)  # since the last flush
    presence_changed: bool = False
    presence_due: float = 0  # not before; the list goes to all and names all, so it has a pace too
    flushing: asyncio.Task | None = None


rooms: dict[str, Room] = {}
closed: deque[str] = deque(maxlen=1_000)  # codes of the rooms that have closed, the latest last
outboxes: set[Outbox] = set()  # of all connections, joined or not
sockets: Counter[str] = Counter()  # connections by address
held: Counter[str] = Counter()  # members by address, those who are reconnecting included
stopping = asyncio.Event()

# Fragments are rendered where nothing may await, so by a template engine that does not.
fragments = app.jinja_env.overlay(enable_async=False).get_template("fragments.html").module

# ── Fan-out ──────────────────────────────────────────────────────────────────────────────────────
# One event loop runs everything, and it changes from one task to another only at an await. Between
# two awaits nothing can interleave, so a plain function is a transaction and needs no lock.


def open_room(code: str) -> Room:
    """Open a room; Close 4503 if there are too many.

    Its numbers start from the clock, in milliseconds: opened again after a restart it goes on
    above its old numbers, so that an old cursor is never mistaken for a new one.
    """
    if len(rooms) >= limits["ROOMS"]:
        raise Close(4503, "There are too many rooms. Try again later.")
    unentered = asyncio.get_running_loop().call_later(limits["UNENTERED"], close_room, code)
    room = rooms[code] = Room(code, unentered, seq=time.time_ns() // 1_000_000)
    return room


def close_room(code: str) -> None:
    del rooms[code]
    closed.append(code)


def enter(room: Room, member: Member, outbox: Outbox, after: int) -> None:
    """Connect a member, and hand it what was said since the entry `after` (0: all that we have).

    Snapshot and subscription are one step: with an await between the two, an entry posted in
    that moment would be in neither, or in both.
    """
    room.unentered.cancel()
    if member.grace:
        member.grace.cancel()
    if member.outbox:
        hang_up(member.outbox, Close(4409, "You opened this chat in another tab."))
    room.members[member.id] = member
    member.outbox, member.skip = outbox, len(room.pending)

    oldest = room.history[0][0] if room.history else room.seq + 1
    hole = after != 0 and not oldest - 1 <= after <= room.seq
    gap = [fragments.gap(seq=oldest - 1)] if hole else []
    missed = [entry for seq, entry in room.history if seq > after or hole]
    outbox.put_nowait([fragments.welcome(member), *gap, *missed])
    wake(room, presence=True)


def lose(room: Room, member: Member, outbox: Outbox, grace: float) -> None:
    """Note that a connection has ended: its member leaves, unless it is back in `grace` seconds."""
    if member.outbox is not outbox:
        return  # it has another one by now
    member.outbox = None
    member.grace = asyncio.get_running_loop().call_later(grace, leave, room, member)
    wake(room, presence=True)


def leave(room: Room, member: Member) -> None:
    """Take a member out of its room, and forget the room with the last one."""
    member.outbox = None
    room.typing.discard(member)
    del room.members[member.id]
    held[member.address] -= 1
    if not held[member.address]:
        del held[member.address]
    post(room, fragments.notice, text=f"{member.name} left")
    wake(room, presence=True)
    if not room.members:
        close_room(room.code)


def say(room: Room, member: Member, id: str, text: str) -> None:
    """Post what a member says, once, or tell it why not; Close 1008 if it does not stop."""
    if not stacked(text):
        text = unicodedata.normalize("NFC", text)
    text = HIDDEN.sub("", text.replace("\r\n", "\n")).strip("\n")
    key = hash((member.id, id))  # 8 bytes to remember, and other ones in each run
    if key in room.posted:
        verdict, why = "confirmed", ""  # sent again, because the echo had not reached it
    elif not text.strip() or len(text) > limits["MESSAGE_LENGTH"]:
        verdict, why = "refused", f"A message has 1 to {limits['MESSAGE_LENGTH']} characters."
    elif member.messages.take():
        room.posted[key] = None
        if len(room.posted) > IDS_REMEMBERED + 64 * len(room.members):
            room.posted.popitem(last=False)
        room.typing.discard(member)
        return post(room, fragments.message, member=member, id=id, pieces=PIECES.split(text))
    else:
        verdict, why = "later", "You are too fast. Your message is sent again in a moment."
    if verdict != "confirmed" and not member.refusals.take():
        raise Close(1008, "You sent too many messages.")
    deliver(room, member, [fragments.verdict(id, verdict, why)])


def post(room: Room, fragment, **values) -> None:
    """Give an entry the room's next number, render it once for everybody, and have it sent."""
    room.seq += 1
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = str(fragment(seq=room.seq, time=now, **values))
    room.history.append((room.seq, entry))
    room.history_bytes += sys.getsizeof(entry)
    trim(room)
    room.pending.append(entry)
    wake(room)


def share() -> int:
    """Return how many bytes a room's history may take: the more rooms there are, the fewer."""
    return min(limits["HISTORY_BYTES"], limits["TALK_BYTES"] // max(1, len(rooms)))


def trim(room: Room) -> None:
    """Forget the oldest entries of a room that has too many."""
    while len(room.history) > limits["HISTORY"] or room.history_bytes > share():
        room.history_bytes -= sys.getsizeof(room.history.popleft()[1])


def wake(room: Room, presence: bool = False) -> None:
    """Make sure that a flush runs, and takes the list of members along if that has changed."""
    room.presence_changed |= presence
    if not room.flushing or room.flushing.done():
        room.flushing = asyncio.create_task(flush(room))


async def flush(room: Room) -> None:
    """Hand all that is pending to all members as one frame, and again while there is something.

    In between it pauses for as long as sending to so many takes. An idle room thus sends at once;
    a busy one sends fewer and larger frames instead of falling behind, because a frame costs a
    wake-up and a system call, however much is in it.
    """
    while room.pending or room.presence_changed or room.typing:
        pending, room.pending = room.pending, []
        presence, now = "", time.monotonic()
        if room.presence_changed and now >= room.presence_due:
            presence = str(fragments.presence(room.members.values()))
            room.presence_changed, room.presence_due = False, now + len(room.members) / 500
        # Who is typing is news for a moment only: neither numbered nor remembered. Three are a crowd.
        typing = str(fragments.typing(list(room.typing)[:3])) if room.typing else ""
        room.typing.clear()
        news = [*pending, *filter(None, (presence, typing))]
        batch = list(in_frames(news, FRAME_SIZE_FOR_ALL))
        for member in list(room.members.values()):
            rest = news[member.skip :] if member.skip else batch
            member.skip = 0
            deliver(room, member, rest)
        frames = max(1, len(batch)) * len(room.members)
        await asyncio.sleep(frames / limits["FRAMES_PER_SECOND"])


def in_frames(strings: list[str], most: int) -> Iterator[str]:
    """Join strings to frames of at most so many characters, unless a single one has more."""
    frame, size = [], 0
    for string in strings:
        if size and size + len(string) > most:
            yield "".join(frame)
            frame, size = [], 0
        frame.append(string)
        size += len(string)
    if size:
        yield "".join(frame)


def deliver(room: Room, member: Member, batch: list[str]) -> None:
    """Put a batch in a member's outbox; if that is full, evict the member rather than wait.

    Waiting would make the room as slow as its slowest member, and without a bound one dead phone
    would eat the memory. Who is evicted comes back and resumes from the history.
    """
    try:
        if member.outbox and batch:
            member.outbox.put_nowait(batch)
    except asyncio.QueueFull:
        hang_up(member.outbox, Close(1013, "You were too slow. Come back and resume."))
        lose(room, member, member.outbox, limits["GRACE_LOST"])


def hang_up(outbox: Outbox, close: Close) -> None:
    """Have the relay of this outbox end its connection, after what waits or, if it is full, at once."""
    if outbox.full():
        while not outbox.empty():  # all of it: a hole in the middle would be taken for the whole
            outbox.get_nowait()
    outbox.put_nowait([close])


# ── The WebSocket ────────────────────────────────────────────────────────────────────────────────


@app.websocket("/r/<code>/ws")
async def connection(code: str) -> None:
    """Serve one connection: receive and relay side by side, until one of them raises Close.

    In a TaskGroup, which ends the one when the other ends: a member that can still hear but no
    longer speak is worse than one that is gone.
    """
    ws = websocket._get_current_object()  # what `websocket` stands for, looked up once
    if not guards.same_origin():
        log_limit("ORIGINS")
        return "This page may not connect here.", 403
    end = Close(1011, "The server has made a mistake.")
    address = guards.address()
    await ws.accept()  # even to say no: a browser shows the code of a close, but not of a refusal
    outbox = Outbox()
    outboxes.add(outbox)
    sockets[address] += 1
    try:
        if stopping.is_set():
            raise Close(1012, "The server restarts.")
        if len(outboxes) > limits["SOCKETS"]:
            raise Close(4503, "This server is full. Try again later.")
        if sockets[address] > limits["SOCKETS_PER_ADDRESS"]:
            log_limit("SOCKETS_PER_ADDRESS")
            raise Close(4503, "There are too many connections from your network.")
        async with asyncio.TaskGroup() as both:
            both.create_task(relay(outbox, ws))
            both.create_task(receive(code, outbox, ws))
    except* Close as closes:
        end = closes.exceptions[0]
        log.info("Closed with %s: %s", *end.args)
    except* OSError:
        pass  # the network has given up
    except* Exception as errors:
        log.error("A connection failed", exc_info=errors)
    finally:
        try:
            # Always with a code: without, it would be 1000, and nobody would come back.
            await ws.close(*end.args)
        except OSError:
            pass  # the network has given up
        finally:
            outboxes.discard(outbox)
            sockets[address] -= 1
            if not sockets[address]:
                del sockets[address]


async def relay(outbox: Outbox, ws) -> None:
    """Carry batches from the outbox to the socket, as long as the connection lasts."""
    while True:
        await carry(await outbox.get(), outbox, ws)


async def carry(waiting: list, outbox: Outbox, ws) -> None:
    """Send a batch, and with it a few that have piled up; then raise Close, if there is one.

    A function of its own, so that its variables go with it: an idle relay must not keep what it has
    sent last. With a thousand connections that was 0.5 GB.
    """
    while not outbox.empty() and sum(map(sys.getsizeof, waiting)) < FRAME_SIZE:
        waiting = waiting + outbox.get_nowait()
    news = [item for item in waiting if isinstance(item, str)]
    for frame in in_frames(news, FRAME_SIZE):
        await ws.send(frame)
    for close in waiting:
        if isinstance(close, Close):
            raise close


async def receive(code: str, outbox: Outbox, ws) -> None:
    """Read frames and act on them: a hello, then the rest, until the connection ends."""
    frames = allowance("FRAME")
    try:
        async with asyncio.timeout(limits["JOIN_DEADLINE"]):
            room, member = await hello(code, outbox, ws, frames)
    except TimeoutError:
        raise Close(1008, "You did not say hello in time.") from None
    grace = limits["GRACE_LOST"]
    try:
        async with asyncio.timeout(limits["SILENCE"]) as silence:
            while True:
                frame = None  # while it waits for the next one it must not keep the last one
                frame = await next_frame(ws, frames)
                later = asyncio.get_running_loop().time() + limits["SILENCE"]
                if silence.when() < later - limits["SILENCE"] / 10:  # not for each frame: it costs
                    silence.reschedule(later)
                grace = limits["GRACE_LOST"]
                if member.outbox is not outbox:
                    continue  # evicted or taken over: it will be said again on the next connection
                match frame:
                    case {"say": str(text), "id": str(id)} if ID.fullmatch(id):
                        say(room, member, id, text)
                    case {"typing": True}:
                        room.typing.add(member)
                        wake(room)
                    case {"here": int()}:
                        pass  # that it came is enough: the silence is over
                    case {"bye": True}:
                        grace = limits["GRACE_CLOSED"]
                    case {"leave": True}:
                        raise Close(1000, "You left the room.")
                    case _:
                        raise Close(1008, "That is not a frame of this chat.")
    except TimeoutError:
        raise Close(1013, "You were silent for too long. Come back and resume.") from None
    except Close:  # left, or broke a rule: nobody who comes back
        if member.outbox is outbox:
            leave(room, member)
        raise
    finally:
        lose(room, member, outbox, grace)


async def hello(code: str, outbox: Outbox, ws, frames: Allowance) -> tuple[Room, Member]:
    """Wait for a hello that can be used; after an unusable name there may be another."""
    while True:
        frame = await next_frame(ws, frames)
        try:
            return admit(code, frame, outbox)
        except ValueError as why:
            outbox.put_nowait([fragments.unusable(why)])


def admit(code: str, frame: dict, outbox: Outbox) -> tuple[Room, Member]:
    """Enter whoever says hello, somebody new or somebody who was here, even before a restart.

    ValueError says why a name cannot be used. Close: 4404 no such room, 4401 not a token of this
    room, 4503 full, 1008 not a hello.
    """
    signer = URLSafeSerializer(limits["SECRET"], salt="member")
    match frame:
        case {"hello": {"name": str(raw)}}:
            run, id, name, after = RUN, secrets.token_hex(8), usable_name(raw), 0
            room = find_room(code)
        case {"hello": {"token": str(token), "after": int(after)}}:
            try:
                home, run, id, name, _ = signer.loads(token)
            except BadSignature:
                home = None  # no longer ours after a restart without CHAT_SECRET
            if home != code:  # the same whether there is such a room or not: nothing to guess from
                raise Close(4401, "You were not in this room. Give your name again.")
            room = rooms.get(code)
            if not room and run != RUN and code not in closed:
                room = open_room(code)  # nobody has left it: it was a restart
        case _:
            raise Close(1008, "The first frame has to be a hello.")
    if not room:
        raise Close(4404, "There is no such room, or it has closed.")
    member = room.members.get(id)
    if not member:
        address = guards.address()
        check_space(room, address)
        name = unlike_others(name, room)
        secret = secrets.token_hex(16)  # 128 bits that only this member knows
        member = Member(id, name, signer.dumps([code, RUN, id, name, secret]), address)
        held[address] += 1
        if run == RUN:  # after a restart members come back without a word
            post(room, fragments.notice, text=f"{name} joined")
    enter(room, member, outbox, after)
    if len(room.members) > limits["MEMBERS"]:  # who is lost makes way for who is here
        lost = next(member for member in room.members.values() if not member.outbox)
        lost.grace.cancel()
        leave(room, lost)
    return room, member


async def next_frame(ws, frames: Allowance) -> dict:
    """Return the next frame, an object with one verb; Close 1008 or 1009 if it is anything else."""
    raw = await ws.receive()
    if not frames.take():
        raise Close(1008, "You sent too many frames.")
    if not isinstance(raw, str):
        raise Close(1008, "A frame has to be text.")
    if len(raw.encode()) > limits["FRAME_BYTES"]:
        raise Close(1009, f"A frame has at most {limits['FRAME_BYTES']} bytes.")
    try:
        frame = json.loads(raw)
        if "\\u" in raw:
            json.dumps(frame, ensure_ascii=False).encode()  # "\ud800" can be read, but not sent
    except (ValueError, RecursionError):
        raise Close(1008, "A frame has to be JSON.") from None
    if not isinstance(frame, dict) or len(frame.keys() - {"id"}) != 1:
        raise Close(1008, "A frame has to be an object with one verb.")
    return frame


# ── Names ────────────────────────────────────────────────────────────────────────────────────────


def stacked(text: str) -> bool:
    """Whether a letter carries more than 30 marks. To normalize n of them takes n² steps: 0.1 s for
    what fits into one frame, and everybody would wait."""
    marks = 0
    for character in "" if text.isascii() else text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > 30:
            return True
    return False


def usable_name(raw: str) -> str:
    """Return a name as it will be shown; ValueError says why it cannot be used."""
    if len(raw) > 100:  # NFKC can make 18 characters of one
        raise ValueError(f"A name has at most {limits['NAME_LENGTH']} characters.")
    name = re.sub(" +", " ", unicodedata.normalize("NFKC", raw).strip())
    kinds = [unicodedata.category(character) for character in JOINER.sub("", name)]
    if {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} & set(kinds) or BLANK.search(name):
        raise ValueError("This name has characters that cannot be seen. Please leave them out.")
    if not any(kind[0] in "LNPS" for kind in kinds):
        raise ValueError("Please give a name.")
    if len(name) > limits["NAME_LENGTH"]:
        raise ValueError(f"A name has at most {limits['NAME_LENGTH']} characters.")
    if "MMM" in "".join(kind[0] for kind in kinds):
        raise ValueError("This name has too many marks on one letter.")
    return name


def unlike_others(name: str, room: Room) -> str:
    """Return the name, with a number if somebody in the room has one that looks the same."""

    def look(name: str) -> str:
        visible = re.sub("[\u200c\u200d\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]", "", name)
        return unicodedata.normalize("NFKC", visible.casefold())

    taken, unique, number = {look(member.name) for member in room.members.values()}, name, 2
    while look(unique) in taken:
        unique, number = f"{name} {number}", number + 1
    return unique


# ── Strangers ────────────────────────────────────────────────────────────────────────────────────
# They are told apart by address. The caches bound the memory: who has long done nothing is forgotten
# first.


@lru_cache(10_000)
def new_rooms(address: str) -> Allowance:
    return allowance("NEW_ROOM", seconds=60)


@lru_cache(10_000)
def new_members(address: str) -> Allowance:  # a class at once, and again in ten minutes
    return Allowance(limits["SOCKETS_PER_ADDRESS"] / 600, limits["SOCKETS_PER_ADDRESS"])


@lru_cache(10_000)
def wrong_codes(address: str) -> Allowance:
    if address == "all":
        return Allowance(limits["WRONG_CODES_IN_ALL"] / 60, limits["WRONG_CODES_IN_ALL"])
    return Allowance(limits["WRONG_CODES"] / 600, limits["WRONG_CODES"])


def find_room(code: str) -> Room | None:
    """Return the room with this code, if there is one; Close 1008 after too many wrong codes.

    Then even for a right code, or whoever tries them all would still find the rooms. Codes of rooms
    that have closed are not counted: a class that reloads its pages is not guessing.
    """
    address = guards.address()
    guesses = {"WRONG_CODES": wrong_codes(address), "WRONG_CODES_IN_ALL": wrong_codes("all")}
    for limit, guess in guesses.items():
        if not guess.has():
            log_limit(limit)
            raise Close(1008, "Too many wrong codes have been tried. Try again in ten minutes.")
    if code not in rooms and code not in closed:
        for guess in guesses.values():
            guess.take()
    return rooms.get(code)


def check_space(room: Room, address: str) -> None:
    """Do nothing if there is space for one more member; else Close 4503.

    Members are counted by address even while they are reconnecting: to say hello, to hang up, and
    that a thousand times, would fill the server.
    """
    if held[address] >= limits["SOCKETS_PER_ADDRESS"]:
        log_limit("SOCKETS_PER_ADDRESS")
        raise Close(4503, "There are too many members from your network.")
    if sum(held.values()) >= 2 * limits["SOCKETS"]:
        raise Close(4503, "This server is full. Try again later.")
    here = sum(member.outbox is not None for member in room.members.values())
    if here >= limits["MEMBERS"]:
        raise Close(4503, "This room is full.")
    if not new_members(address).take():  # or joining and leaving would be a way to flood
        log_limit("SOCKETS_PER_ADDRESS")
        raise Close(4503, "Too many have joined from your network. Try again in a few minutes.")


def log_limit(limit: str) -> None:
    """Log that this client has reached a limit; once an hour, or an attack would fill the disk."""
    log_once("%s has reached the limit CHAT_%s", guards.address(), limit, time.time() // 3600)


@lru_cache(10_000)
def log_once(sentence: str, *values) -> None:
    log.warning(sentence, *values[:2])


# ── Pages ────────────────────────────────────────────────────────────────────────────────────────


@app.get("/")
async def home(title="Chat", text=None, status=200):
    """Show where rooms are created and joined; with a title and a text, also what went wrong."""
    while (code := "".join(secrets.choice(ALPHABET) for _ in range(6))) in rooms:
        pass
    return await render_template("home.html", title=title, text=text, code=code), status


@app.get("/join")
async def join():
    """Lead to a room by its code, typed in any case and with any spacing, or by a pasted link."""
    typed = request.args.get("code", "").strip().rstrip("/").rsplit("/", 1)[-1]
    code = re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", typed)).upper()
    if CODE.fullmatch(code):
        return redirect(f"/r/{code}", 303)
    return await home("That is not a code", "A code has six letters and digits: KWR4TN.", 400)


@app.post("/r/<code>")
async def create(code: str):
    """Open the room whose code the home page chose: a proxy can tell rooms apart by the path."""
    await request.get_data()  # nothing is in it; but one that is too large is refused, with 413
    if not new_rooms(guards.address()).take():  # first: then not even guessing is free of charge
        log_limit("NEW_ROOM_RATE")
        raise Close(1008, "Your network has created many rooms. Wait a minute, and try again.")
    if not CODE.fullmatch(code) or (code in rooms and rooms[code].members):
        return await home("This code cannot be used", "Create a room to get another one.", 409)
    room = rooms.get(code) or open_room(code)  # there already after a double click
    return redirect(f"/r/{room.code}", 303)


@app.get("/r/<code>")
async def room_page(code: str):
    if code != code.upper() and CODE.fullmatch(code.upper()):
        return redirect(f"/r/{code.upper()}", 303)
    if find_room(code):
        return await render_template("room.html", code=code, limits=limits)
    text = "Nobody has created it, or its last member has left. Check the code, or create a room."
    return await home("There is no such room", text, 404)


@app.get("/r/<code>/qr.svg")
async def qr_code(code: str):
    """Draw the link of a room, for phones to read, and for a projector to show to a class."""
    if not find_room(code):
        raise NotFound
    return draw(f"{guards.scheme()}://{request.host}/r/{code}"), {"Content-Type": "image/svg+xml"}


@lru_cache(64)
def draw(link: str) -> bytes:
    drawing = io.BytesIO()
    segno.make(link, micro=False).save(
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


def log_exception(error) -> None:
    """Quart would log the path as well, and with it the code."""
    log.error("A request failed", exc_info=error)


app.log_exception = log_exception


@app.errorhandler(Close)
async def refusal_page(close: Close):
    """Say on a page what a WebSocket says with its close: there are limits on both ways."""
    code, reason = close.args
    return await home("Sorry", reason, 503 if code == 4503 else 429)


@app.errorhandler(HTTPException)
async def error_page(error: HTTPException):
    return await home(error.name, error.description, error.code)


# ── Start and stop ───────────────────────────────────────────────────────────────────────────────


async def run(listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, and then tell everybody: 1012 means come back in a moment."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))

    async def stopped() -> None:
        await stop.wait()
        loop.call_later(4, os._exit, 0)  # the last resort: a peer that never reads blocks a close
        stopping.set()
        for outbox in outboxes:
            hang_up(outbox, Close(1012, "The server restarts."))
        deadline = time.monotonic() + 1
        while outboxes and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    heart = asyncio.create_task(beat())
    guards.install(app, lambda: allowance("FRAME"))
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.websocket_max_message_size = limits["FRAME_BYTES"]
    config.loglevel, config.include_server_header = "WARNING", False
    await serve(app, config, shutdown_trigger=stopped)
    heart.cancel()


async def beat() -> None:
    """Send everybody a heartbeat, and have one back; who does not answer is silent, see receive.

    It tells a browser an idle room from a dead line. The server sets the pace, because the timers
    of a hidden tab stand still.
    """
    while True:
        await asyncio.sleep(limits["BEAT"])
        for outbox in outboxes:
            if not outbox.full():
                outbox.put_nowait([fragments.beat()])
        for room in rooms.values():
            trim(room)  # those in which nobody talks, too, when there are more and more rooms


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A room chat on WebSockets.",
        epilog="settings, in the environment:\n"
        + "\n".join(
            f"  CHAT_{n} ({default or 'not set'}): {what}"
            for n, (default, what) in SETTINGS.items()
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0: everywhere")
    parser.add_argument("--port", default=8000, type=int)
    options = parser.parse_args()
    host, port = options.host, options.port
    for variable in os.environ:
        if variable.startswith("CHAT_") and variable.removeprefix("CHAT_") not in SETTINGS:
            parser.error(f"{variable}, in the environment, is not a setting")
    for name, (default, _) in SETTINGS.items():
        least = 0.001 if name in ("BEAT", "FRAMES_PER_SECOND") else 0
        number = type(limits[name]) in (int, float) and limits[name] >= least
        if not number and not isinstance(default, str):
            parser.error(
                f"CHAT_{name}, in the environment, has to be a number, and not below {least}"
            )
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = host == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server(
            (host, port), family=family, backlog=1024, dualstack_ipv6=both
        )
    except (OSError, OverflowError) as why:
        reason = str(getattr(why, "strerror", why)).split(" (")[0]
        sys.exit(f"Cannot listen on {host}, port {port}: {reason}.")
    guards.harden(listener)
    address = network_address() if host in ("0.0.0.0", "::") else host
    address = f"[{address}]" if ":" in address else address
    link = f"http://{address}:{listener.getsockname()[1]}"
    print(f"Chat is on {link} (Ctrl-C stops it)", flush=True)
    if host in ("0.0.0.0", "::"):
        with suppress(UnicodeEncodeError):  # a terminal that has no blocks
            segno.make(link, micro=False).terminal(compact=True)  # for the phones in the same room
    asyncio.run(run(listener))


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
