"""A room chat on WebSockets: rooms, fan-out, delivery and pages, all of it in this file.

    pip install -r requirements.txt
    python chat.py                  # then open http://127.0.0.1:8000 in two tabs

The path of a message. Only its two ends await, so nothing can interleave in the middle:

    browser ─frame─▶ receive ─▶ post ─▶ room.pending ─▶ flush ─▶ outboxes ─▶ relay ─frame─▶ browsers
                     (await)    (def)                 (one a room) (queues)  (await)

The words:

    room     people who talk, found by a code such as KWR4TN; gone when the last member has left
    member   one tab in one room: here (has an outbox), reconnecting (has none) or left (forgotten)
    entry    a line of the log, message or notice; its seq is one more than that of the entry before
    outbox   what one connection still has to be sent; bounded, so that nobody waits for a slow one
    fan-out  to hand one entry to every member of a room
    evict    to end a slow consumer's connection; it comes back by itself and resumes
    frame    what a WebSocket carries: JSON from the browser, fragments of HTML to it
"""

import argparse
import asyncio
import hashlib
import json
import os
import re
import secrets
import signal
import socket
import sys
import time
import unicodedata
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime

try:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config
    from itsdangerous import BadSignature, URLSafeSerializer
    from quart import Quart, redirect, render_template, request, websocket
    from werkzeug.exceptions import HTTPException, NotFound
except ModuleNotFoundError as missing:
    sys.exit(f"The package {missing.name} is not installed. Run: pip install -r requirements.txt")

# ── Limits ────────────────────────────────────────────────────────────────────────────────────────
# Each can be set in the environment: CHAT_MEMBERS=40 python chat.py. README.md lists them all.

app = Quart(__name__)
limits = app.config
limits.from_mapping(
    MESSAGE_LENGTH=2_000,  # characters, after NFC
    MESSAGE_RATE=2,  # messages a second and member, after a burst of …
    MESSAGE_BURST=10,
    FRAME_BYTES=16_384,
    FRAME_RATE=10,  # frames of any kind a second and connection, after a burst of …
    FRAME_BURST=60,
    NAME_LENGTH=24,  # characters, after NFKC
    MEMBERS=250,  # in one room, those who are reconnecting included
    ROOMS=1_000,
    SOCKETS=2_000,
    HISTORY=200,  # entries that a room remembers, and at most so many bytes of them:
    HISTORY_BYTES=262_144,
    OUTBOX=64,  # batches that may wait for one slow member
    FRAMES_PER_SECOND=8_000,  # to all members of a room together, see flush
    JOIN_DEADLINE=10,  # seconds from connecting to a usable hello
    BEAT=20,  # seconds after which a connection that had nothing to carry carries a heartbeat
    SILENCE=50,  # seconds without a frame after which a connection counts as lost
    GRACE_CLOSED=5,  # seconds to come back after closing the page, because a reload is no leaving
    GRACE_LOST=120,  # seconds to come back after a lost connection, because phones freeze tabs
    UNENTERED=600,  # seconds that a room waits for its first member
    BODY_BYTES=16_384,
    SECRET="",  # signs the members' tokens; empty: a new one at each start
)
limits.from_prefixed_env("CHAT")
limits["SECRET"] = str(limits["SECRET"] or secrets.token_hex())
limits["MAX_CONTENT_LENGTH"] = limits["BODY_BYTES"]

IDS_REMEMBERED = 2_000  # in a room, and 128 for each member: more than it can have unconfirmed
ALPHABET = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"  # no 0 O 1 I L: codes are read out
CODE = re.compile(f"[{ALPHABET}]{{6}}")
RUN = secrets.token_hex(4)  # names this run of the program: a token of another one means a restart
ID = re.compile("[A-Za-z0-9_-]{1,64}")
PIECES = re.compile(  # of a message: fenced code, code, links; re.split puts them at odd indices
    r"""(```.*?```\n?|`[^`\n]+`|https?://[^\s<>"]*[^\s<>"'.,;:!?)\]}])""", re.DOTALL
)
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)  # bidi overrides too
BLANK = re.compile("[\u3164\u115f\u1160\uffa0\u2800\u034f]")  # letters that look like nothing
JOINERS = re.compile("[\u200c\u200d\ufe00-\ufe0f]")
INNER_JOINER = re.compile("(?<=[^\x00-\x7f])[\u200c\u200d](?=[^\x00-\x7f])")  # 👩‍🚀, Persian

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the code of a room is in its address
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
NO_ROOM = "Nobody has created a room with this code, or its last member has left and it has closed."


class Close(Exception):
    """Ends a connection: `raise Close(code, reason)`; README.md lists the codes."""


class Allowance:
    """A token bucket: as many events at once as the limit's BURST says, then its RATE a second."""

    def __init__(self, limit: str):
        self.rate, self.burst = limits[f"{limit}_RATE"], limits[f"{limit}_BURST"]
        self.left, self.checked = self.burst, time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        self.left = min(self.burst, self.left + (now - self.checked) * self.rate)
        self.checked = now
        allowed = self.left >= 1
        self.left -= allowed
        return allowed


# ── State ─────────────────────────────────────────────────────────────────────────────────────────
# All of it. Only the functions under "Fan-out" change it, and a room is forgotten in leave.


@dataclass(eq=False, slots=True)
class Member:
    id: str  # public, stands in every message; tells nothing about the token
    name: str
    token: str  # proves after a lost connection that this is the same member
    outbox: asyncio.Queue | None = None  # None while reconnecting
    skip: int = 0  # so many of room.pending are in the snapshot that it was given
    grace: asyncio.TimerHandle | None = None  # runs while reconnecting
    messages: Allowance = field(default_factory=lambda: Allowance("MESSAGE"))
    refusals: Allowance = field(default_factory=lambda: Allowance("MESSAGE"))


@dataclass(eq=False, slots=True)
class Room:
    code: str
    seq: int  # number of the latest entry
    members: dict[str, Member] = field(default_factory=dict)
    history: deque[tuple[int, str]] = field(default_factory=deque)
    history_bytes: int = 0
    pending: list[str] = field(default_factory=list)  # posted, but not in the outboxes yet
    posted: dict[tuple[str, str], None] = field(default_factory=dict)  # (member, id), oldest first
    presence_changed: bool = False
    flushing: asyncio.Task | None = None
    unentered: asyncio.TimerHandle | None = None


rooms: dict[str, Room] = {}
outboxes: set[asyncio.Queue] = set()  # of all open connections, joined or not
stopping = asyncio.Event()

# Fragments are rendered where nothing may await, so by a template engine that does not.
fragments = app.jinja_env.overlay(enable_async=False).get_template("fragments.html").module

# ── Fan-out ───────────────────────────────────────────────────────────────────────────────────────
# One event loop runs everything, and it changes from one task to another only at an await. Between
# two awaits nothing can interleave, so a plain function is a transaction and needs no lock.


def open_room(code: str) -> Room:
    """Open a room, which closes again when nobody enters; Close 4503 when there are too many.

    Numbers start from the clock, in milliseconds. A room that is opened again after a restart
    thus goes on above its old numbers, and an old cursor is never mistaken for a new one.
    """
    if len(rooms) >= limits["ROOMS"]:
        raise Close(4503, "There are too many rooms. Try again later.")
    room = rooms[code] = Room(code, seq=time.time_ns() // 1_000_000)
    room.unentered = asyncio.get_running_loop().call_later(limits["UNENTERED"], close_room, room)
    return room


def close_room(room: Room) -> None:
    """Forget a room and everything that was said in it."""
    room.unentered.cancel()
    del rooms[room.code]


def enter(room: Room, member: Member, outbox: asyncio.Queue, after: int = 0) -> None:
    """Connect a member to its room, and hand it what was said since `after` (0: all we have).

    Snapshot and subscription happen in one step: with an await between them, an entry posted
    in that moment would be in neither of them, or in both.
    """
    room.unentered.cancel()
    if member.grace:
        member.grace.cancel()
    if member.outbox:
        hang_up(member.outbox, Close(4409, "You opened this chat in another tab."))
    room.members[member.id] = member
    member.outbox, member.skip = outbox, len(room.pending)

    oldest = room.history[0][0] if room.history else room.seq + 1
    hole = after and not oldest - 1 <= after <= room.seq
    missed = [entry for seq, entry in room.history if seq > after or hole]
    gap = [fragments.gap(seq=oldest - 1)] if hole else []
    outbox.put_nowait("".join([fragments.welcome(member), *gap, *missed]))
    changed_presence(room)


def lose(room: Room, member: Member, outbox: asyncio.Queue, grace: float) -> None:
    """Note that a member's connection is gone; unless it comes back in `grace` seconds, it leaves."""
    if member.outbox is not outbox:
        return  # it has come back on another connection meanwhile
    member.outbox = None
    if grace:
        member.grace = asyncio.get_running_loop().call_later(grace, leave, room, member)
        changed_presence(room)
    else:
        leave(room, member)


def leave(room: Room, member: Member) -> None:
    """Take a member out of its room, and close the room behind the last one."""
    del room.members[member.id]
    post(room, fragments.notice, text=f"{member.name} left")
    changed_presence(room)
    if not room.members:
        close_room(room)


def say(room: Room, member: Member, id: str, text: str) -> None:
    """Post what a member says, once; or tell this member alone why not. Close 1008 for a flood."""
    text = INVISIBLE.sub("", unicodedata.normalize("NFC", text.replace("\r\n", "\n"))).strip("\n")
    if (member.id, id) in room.posted:
        verdict, why = "confirmed", ""  # sent twice, because our echo had not arrived
    elif not text.strip():
        verdict, why = "refused", "There is nothing in this message."
    elif len(text) > limits["MESSAGE_LENGTH"]:
        verdict, why = "refused", f"A message has at most {limits['MESSAGE_LENGTH']} characters."
    elif member.messages.take():
        room.posted[member.id, id] = None
        if len(room.posted) > IDS_REMEMBERED + 128 * len(room.members):
            del room.posted[next(iter(room.posted))]
        return post(room, fragments.message, member=member, id=id, pieces=PIECES.split(text))
    elif member.refusals.take():
        verdict, why = "later", "That was too fast. Your message is sent again in a moment."
    else:
        raise Close(1008, "You sent too many messages.")
    deliver(room, member, fragments.verdict(id=id, verdict=verdict, why=why))


def post(room: Room, fragment, **values) -> None:
    """Give an entry the room's next number, render it once for everybody, and have it sent."""
    room.seq += 1
    entry = str(fragment(seq=room.seq, time=datetime.now(UTC), **values))
    room.history.append((room.seq, entry))
    room.history_bytes += len(entry.encode())
    while len(room.history) > limits["HISTORY"] or room.history_bytes > limits["HISTORY_BYTES"]:
        room.history_bytes -= len(room.history.popleft()[1].encode())
    room.pending.append(entry)
    wake(room)


def changed_presence(room: Room) -> None:
    """Have the list of members sent; several changes before the next flush go out as one."""
    room.presence_changed = True
    wake(room)


def wake(room: Room) -> None:
    if not room.flushing:
        room.flushing = asyncio.create_task(flush(room))


async def flush(room: Room) -> None:
    """Hand what is pending to all members, as one frame; again, as long as there is something.

    The pause is as long as sending to so many members takes. An idle room thus sends at once,
    and a busy one sends fewer and larger frames instead of falling behind: a frame has a cost
    (a system call, a wake-up) that does not depend on how much is in it.
    """
    while room.pending or room.presence_changed:
        pending, room.pending = room.pending, []
        presence = str(fragments.presence(room.members.values())) if room.presence_changed else ""
        room.presence_changed = False
        frame = "".join(pending) + presence
        for member in list(room.members.values()):
            deliver(
                room, member, "".join(pending[member.skip :]) + presence if member.skip else frame
            )
            member.skip = 0
        await asyncio.sleep(len(room.members) / limits["FRAMES_PER_SECOND"])
    room.flushing = None


def deliver(room: Room, member: Member, frame: str) -> None:
    """Put a frame in a member's outbox. A full one means a slow consumer: evict, never wait.

    Waiting would make the whole room as slow as its slowest member, and a larger outbox would
    let one dead phone eat the memory. Who is evicted comes back, and resumes from the history.
    """
    if not member.outbox or not frame:
        return
    try:
        member.outbox.put_nowait(frame)
    except asyncio.QueueFull:
        hang_up(member.outbox, Close(1013, "You were too slow. Come back and resume."))
        lose(room, member, member.outbox, limits["GRACE_LOST"])


def hang_up(outbox: asyncio.Queue, close: Close) -> None:
    """Let a connection's relay close it, as the last thing that it does."""
    while outbox.full():
        outbox.get_nowait()
    outbox.put_nowait(close)


# ── The WebSocket ─────────────────────────────────────────────────────────────────────────────────


@app.websocket("/r/<code>/ws")
async def connection(code: str) -> None:
    """Serve one connection: receive and relay run side by side until one of them raises.

    A TaskGroup, because a member who can hear but not speak, or speak but not hear, is worse
    than one who is gone: when one of the two ends, so does the other.
    """
    ws = websocket._get_current_object()  # the real one: the proxy looks it up again at each use
    await ws.accept()
    outbox = asyncio.Queue(limits["OUTBOX"])
    outboxes.add(outbox)
    end = Close(1011, "The server made a mistake.")
    try:
        if stopping.is_set():
            raise Close(1012, "The server restarts.")
        if len(outboxes) > limits["SOCKETS"]:
            raise Close(4503, "This server is full. Try again later.")
        async with asyncio.TaskGroup() as both:
            both.create_task(relay(outbox, ws))
            both.create_task(receive(code, outbox, ws))
    except* Close as closes:
        end = closes.exceptions[0]
    except* OSError:
        pass  # the network gave up while something was being sent
    except* Exception as errors:
        app.logger.error("A connection failed", exc_info=errors)
    finally:
        # Always say a code: without one it would be 1000, on which no browser comes back.
        await ws.close(*end.args)
        outboxes.discard(outbox)


async def relay(outbox: asyncio.Queue, ws) -> None:
    """Carry frames from the outbox to the socket; whatever waits goes out as one."""
    while True:
        try:
            async with asyncio.timeout(limits["BEAT"]):
                waiting = [await outbox.get()]
        except TimeoutError:
            waiting = [fragments.beat()]  # so that a browser can tell an idle room from a dead line
        while not outbox.empty():
            waiting.append(outbox.get_nowait())
        close = waiting.pop() if isinstance(waiting[-1], Close) else None
        if waiting:
            await ws.send("".join(waiting))
        if close:
            raise close


async def receive(code: str, outbox: asyncio.Queue, ws) -> None:
    """Read a connection's frames and act on them, from hello to the end."""
    frames = Allowance("FRAME")
    try:
        async with asyncio.timeout(limits["JOIN_DEADLINE"]):
            room, member = await hello(code, outbox, ws, frames)
    except TimeoutError:
        raise Close(1008, "You did not say hello in time.") from None
    grace = limits["GRACE_LOST"]
    try:
        while True:
            async with asyncio.timeout(limits["SILENCE"]):
                frame = await next_frame(ws, frames)
            grace = limits["GRACE_LOST"]
            match frame:
                case {"say": str(text), "id": str(id)} if ID.fullmatch(id):
                    say(room, member, id, text)
                case {"here": int()}:
                    pass  # it is enough that it came: the silence is over
                case {"bye": True}:
                    grace = limits["GRACE_CLOSED"]
                case {"leave": True}:
                    raise Close(1000, "You left the room.")
                case _:
                    raise Close(1008, "That is not a verb of this chat, or not with these values.")
    except TimeoutError:
        raise Close(1013, "You were silent for too long. Come back and resume.") from None
    except Close:
        grace = 0  # left, or broke a rule: does not come back
        raise
    finally:
        lose(room, member, outbox, grace)


async def hello(code: str, outbox: asyncio.Queue, ws, frames: Allowance) -> tuple[Room, Member]:
    """Wait for a hello that can be used; one with an unusable name may be followed by another."""
    while True:
        match await next_frame(ws, frames):
            case {"hello": {"token": str(token), "after": int(after)}}:
                return come_back(code, token, after, outbox)
            case {"hello": {"name": str(name)}}:
                try:
                    return join(code, usable_name(name), outbox)
                except ValueError as why:
                    outbox.put_nowait(fragments.unusable(why))
            case _:
                raise Close(1008, "The first frame has to be a hello.")


async def next_frame(ws, frames: Allowance) -> dict:
    """Return the next frame: an object with one verb. Close 1008 or 1009 if it is anything else."""
    raw = await ws.receive()
    if not frames.take():
        raise Close(1008, "You sent too many frames.")
    if not isinstance(raw, str):
        raise Close(1008, "A frame has to be text.")
    if len(raw.encode()) > limits["FRAME_BYTES"]:
        raise Close(1009, f"A frame has at most {limits['FRAME_BYTES']} bytes.")
    try:
        frame = json.loads(raw)
        json.dumps(
            frame, ensure_ascii=False
        ).encode()  # half a surrogate pair reads, but never sends
    except (ValueError, RecursionError):
        raise Close(1008, "A frame has to be JSON.") from None
    if not isinstance(frame, dict) or len(frame.keys() - {"id"}) != 1:
        raise Close(1008, "A frame has to be an object with one verb.")
    return frame


def join(code: str, name: str, outbox: asyncio.Queue) -> tuple[Room, Member]:
    """Make somebody new a member of a room; Close 4404 if there is none, 4503 if it is full."""
    if code not in rooms:
        raise Close(4404, "There is no such room, or it has closed.")
    member = admit(rooms[code], name, secrets.token_urlsafe(16))  # 128 random bits
    post(rooms[code], fragments.notice, text=f"{member.name} joined")
    enter(rooms[code], member, outbox)
    return rooms[code], member


def come_back(code: str, token: str, after: int, outbox: asyncio.Queue) -> tuple[Room, Member]:
    """Connect a member again that was here before, even before a restart; Close 4401 or 4404."""
    try:
        home, key, name, run = signer().loads(token)
    except BadSignature:
        home = run = None
    if code not in rooms and run in (None, RUN):
        raise Close(4404, "There is no such room, or it has closed.")
    if home != code:
        raise Close(4401, "This is not a token for this room. Give your name again.")
    room = rooms.get(code) or open_room(code)  # open before a restart, so open again
    member = room.members.get(public_id(key))
    if not member:
        member = admit(room, name, key)
        if run == RUN:  # its leaving was announced
            post(room, fragments.notice, text=f"{member.name} joined")
    enter(room, member, outbox, after)
    return room, member


def admit(room: Room, name: str, key: str) -> Member:
    """Make a member with a name that nobody else in the room has; Close 4503 if the room is full."""
    if len(room.members) >= limits["MEMBERS"]:
        raise Close(4503, "This room is full.")
    taken = {look(member.name) for member in room.members.values()}
    unique, number = name, 2
    while look(unique) in taken:
        unique, number = f"{name} {number}", number + 1
    token = signer().dumps([room.code, key, unique, RUN])
    return Member(public_id(key), unique, token)


def signer() -> URLSafeSerializer:
    return URLSafeSerializer(limits["SECRET"], salt="member")


def public_id(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


# ── Names ─────────────────────────────────────────────────────────────────────────────────────────


def look(name: str) -> str:
    """Return what two names have in common that nobody can tell apart."""
    return unicodedata.normalize("NFKC", JOINERS.sub("", name).casefold())


def usable_name(raw: str) -> str:
    """Return a name as it is shown; ValueError says in a sentence why it cannot be used."""
    name = re.sub(" +", " ", unicodedata.normalize("NFKC", raw).strip())
    kinds = [unicodedata.category(char) for char in INNER_JOINER.sub("", name)]
    if {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} & set(kinds) or BLANK.search(name):
        raise ValueError("This name has characters that cannot be seen. Please leave them out.")
    if not any(kind[0] in "LNPS" for kind in kinds):
        raise ValueError("Please give a name.")
    if len(name) > limits["NAME_LENGTH"]:
        raise ValueError(f"A name has at most {limits['NAME_LENGTH']} characters.")
    if "MMM" in "".join(kind[0] for kind in kinds):
        raise ValueError("This name has too many marks on one letter.")
    return name


# ── Pages ─────────────────────────────────────────────────────────────────────────────────────────


@app.get("/")
async def home():
    return await render_template("home.html", code=new_code())


@app.get("/join")
async def join_by_code():
    """Lead somebody who typed a code, in any case and spacing, or a whole link, to the room."""
    code = tidy(request.args.get("code", ""))
    if CODE.fullmatch(code):
        return redirect(f"/r/{code}", 303)
    why = "A code has six letters and digits, such as KWR4TN."
    return await render_template("home.html", code=new_code(), why=why), 400


@app.post("/r/<code>")
async def create(code: str):
    """Open a room. The home page has chosen the code, so that a proxy can tell rooms by the path."""
    if not CODE.fullmatch(code):
        raise NotFound
    if code not in rooms:
        open_room(code)
    elif rooms[code].members:
        return await sorry(409, "This code is taken", "Create a room to get another.")
    return redirect(f"/r/{code}", 303)


@app.get("/r/<code>")
async def room_page(code: str):
    if code in rooms:
        return await render_template("room.html", code=code, limits=limits)
    if code != tidy(code) and CODE.fullmatch(tidy(code)):
        return redirect(f"/r/{tidy(code)}", 303)
    return await sorry(404, "There is no such room", NO_ROOM)


@app.get("/healthz")
async def health():
    """Return numbers only: no codes, no names."""
    members = sum(len(room.members) for room in rooms.values())
    return {"rooms": len(rooms), "members": members, "connections": len(outboxes)}


@app.errorhandler(HTTPException)
async def refused(error: HTTPException):
    return await sorry(error.code, error.name, error.description)


@app.errorhandler(Close)
async def full(close: Close):
    return await sorry(503, "It is full here", close.args[1])


async def sorry(status: int, title: str, text: str):
    return await render_template("sorry.html", title=title, text=text, code=new_code()), status


@app.after_request
async def protect(response):
    """Forbid everything that the pages do not need, above all any script but our own."""
    response.headers.update(SECURITY_HEADERS)
    versioned = request.path.startswith("/static/vendor")
    response.headers["Cache-Control"] = "max-age=31536000, immutable" if versioned else "no-cache"
    return response


def new_code() -> str:
    """Return a code that no room has; 31 ** 6 = 887 million are too many to guess."""
    while (code := "".join(secrets.choice(ALPHABET) for _ in range(6))) in rooms:
        pass
    return code


def tidy(code: str) -> str:
    """Return a typed code, or the code of a pasted link, as it is written here."""
    return re.sub(r"[\W_]", "", code.strip().rstrip("/").rsplit("/", 1)[-1]).upper()


# ── Start and stop ────────────────────────────────────────────────────────────────────────────────


async def run(listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, then tell everybody (1012: they come back) and return."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))

    async def stopped():
        await stop.wait()
        loop.call_later(4, os._exit, 0)  # a peer that never reads blocks even close
        await close_all()

    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.loglevel = "WARNING"
    await serve(app, config, shutdown_trigger=stopped)


async def close_all() -> None:
    """Refuse newcomers, close all connections with 1012, and give that a second."""
    stopping.set()
    for outbox in outboxes:
        hang_up(outbox, Close(1012, "The server restarts."))
    for _ in range(20):
        if outboxes:
            await asyncio.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description="A room chat on WebSockets.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", default=8000, type=int, help="port to listen on")
    options = parser.parse_args()
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else "there is no such port"
        sys.exit(
            f"Cannot listen on {options.host}, port {options.port}: {why}. Try --port or --host."
        )
    host = network_address() if options.host in ("0.0.0.0", "::") else options.host
    print(f"Chat is on http://{host}:{listener.getsockname()[1]}  (Ctrl-C stops it)", flush=True)
    asyncio.run(run(listener))


def network_address() -> str:
    """Return the address under which others in the same network reach this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # asks for a route; nothing is sent
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


if __name__ == "__main__":
    main()
