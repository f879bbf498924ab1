"""What strangers on the internet make necessary: chat.py is better read without it.

Text and names that deceive, static files, response headers, addresses; and below these the seat
belts for Hypercorn 0.18 and Quart 0.22, which say what happens without them.
"""

import asyncio
import gzip
import hashlib
import re
import socket
import struct
import unicodedata
from collections import Counter
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import ClassVar, NamedTuple

import h11
from hypercorn import protocol
from hypercorn.asyncio import run as serving
from hypercorn.asyncio import tcp_server
from hypercorn.config import Config
from hypercorn.protocol import h11 as http_1
from hypercorn.protocol import ws_stream
from hypercorn.protocol.events import Data, StreamClosed
from quart import Quart, Response, has_websocket_context, request, websocket
from quart.asgi import ASGIWebsocketConnection
from quart.wrappers import Websocket
from wsproto.events import CloseConnection, Message, Ping

# The classes below reach into these: each has been read in this version, and in no other.
FITS = {"hypercorn": "0.18.0", "quart": "0.22.0", "wsproto": "1.3.2", "h11": "0.16.0"}

# ── Text and names ───────────────────────────────────────────────────────────────────────────────

# Never shown: control characters, and overrides of the writing direction. In names also refused:
# letters that look like nothing, and joiners where there is ASCII; inside 👩‍🚀 they are needed.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
BLANK = re.compile("[\u3164\u115f\u1160\uffa0\u2800\u034f\u17b4\u17b5\ufffc\U00016fe4\U0001d159]")
JOINER = re.compile("(?<=[^\x00-\x7f])[\u200c\u200d](?=[^\x00-\x7f])")
VARIANT = re.compile("[\u200c\u200d\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
PIECES = re.compile(  # code blocks, code and links: re.split puts them at the odd indices
    r"""(```.*?```\n?|`[^`\n]+`|https?://(?:\([^\s<>"()]*\)|[^\s<>"()])*"""
    r"""(?:\([^\s<>"()]*\)|[^\s<>"'.,;:!?()\]}]))""",  # Foo_(bar) whole, but no bracket around it
    re.DOTALL,
)
NAME_LENGTH = 24  # characters


def clean(text: str) -> str:
    """Return a message as it will be shown: nothing hidden, no screens full of nothing, and NFC."""
    if not stacked(text):
        text = unicodedata.normalize("NFC", text)
    text = HIDDEN.sub("", text.replace("\r\n", "\n")).strip("\n")
    return re.sub("\n(?:[^\\S\n]*\n){3,}", "\n\n", text)


def stacked(text: str) -> bool:
    """Whether a letter carries more than 30 marks: then it stays as it is. To normalize n of them
    takes n² steps, 0.1 s for what fits into one frame, and everybody would wait."""
    marks = 0
    for character in "" if text.isascii() else text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > 30:
            return True
    return False


def pieces(text: str) -> list[str]:
    """Split a message: at the odd indices is code, or a link. After 50 of them all else is text."""
    return PIECES.split(text, maxsplit=50)


def usable_name(raw: str) -> str:
    """Return a name as it will be shown; ValueError says why it cannot be used.

    What else looks alike, such as AIice with a capital I, is not covered.
    """
    # NFKC can make 18 characters of one: what is too long anyway stays as it is.
    name = raw if len(raw) > 100 else unicodedata.normalize("NFKC", raw)
    name = re.sub(" +", " ", name.strip())
    if len(name) > NAME_LENGTH:
        raise ValueError(f"A name has at most {NAME_LENGTH} characters.")
    if not JOINER.sub("", name).isprintable() or BLANK.search(name):
        raise ValueError("This name has characters that cannot be seen. Please leave them out.")
    kinds = "".join(unicodedata.category(character)[0] for character in JOINER.sub("", name))
    if not set(kinds) & set("LNPS"):
        raise ValueError("Please give a name.")
    if "MMM" in kinds:
        raise ValueError("This name has too many marks on one letter.")
    scripts = {unicodedata.name(letter, "").split(" ")[0] for letter in name if letter.isalpha()}
    if "LATIN" in scripts and scripts & {"CYRILLIC", "GREEK"}:
        raise ValueError("This name mixes two alphabets that look alike. Use one of them.")
    return name


def unlike_others(name: str, taken: list[str]) -> str:
    """Return the name, with a number if it looks like a taken one, or has the same letters."""

    def look(name: str) -> str:
        return unicodedata.normalize("NFKC", VARIANT.sub("", name.casefold()))

    looks, unique, number = set(map(look, taken)), name, 2
    while look(unique) in looks:
        unique, number = f"{name} {number}", number + 1
    return unique


# ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────

HEADERS = {  # on all responses, also those of Hypercorn; MDN's HTTP Observatory gives A+ for them
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # a room's address is the invitation
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
KINDS = {  # of the files in static/ that go out; others stay where they are
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


class File(NamedTuple):
    """A static file as it goes out. All are read at start: what a stranger sends is looked up in a
    dict, and never names a path. (Quart's own route reads each through a thread, which takes 4 ms.)"""

    body: bytes
    packed: bytes  # the same in gzip
    kind: str
    version: str  # a part of its digest, in the address: when the file changes, so does that

    def response(self) -> Response:
        packed = "gzip" in request.headers.get("Accept-Encoding", "")
        response = Response(self.packed if packed else self.body, content_type=self.kind)
        response.headers["Vary"] = "Accept-Encoding"
        if packed:
            response.headers["Content-Encoding"] = "gzip"
        if request.args.get("v") == self.version:
            response.headers["Cache-Control"] = "max-age=31536000, immutable"
        return response


def read_files(folder: Path) -> dict[str, File]:
    """Return the scripts, styles and icons in a folder by their names, as in `vendor/htmx.js`."""
    files = {}
    for path in sorted(folder.rglob("*.*")):
        if path.suffix in KINDS:
            body = path.read_bytes()
            version = hashlib.sha256(body).hexdigest()[:8]
            name = path.relative_to(folder).as_posix()
            files[name] = File(body, gzip.compress(body), KINDS[path.suffix], version)
    return files


def address(client, proxies: int) -> str:
    """Return the address by which limits count: the peer's or, behind proxies, what they say.

    Each proxy appends the address of its own peer to X-Forwarded-For; what stands before those
    anybody can make up. IPv6 is counted by /56: that is what one household gets.
    """
    told = ",".join(client.headers.getlist("X-Forwarded-For")).split(",")
    peer = (client.scope.get("client") or ("",))[0]
    return counted(told[-proxies].strip() if 0 < proxies <= len(told) else peer)


@lru_cache(1_000)
def counted(text: str) -> str:
    try:
        address = ip_address(text)
    except ValueError:
        return "unknown"
    if address.version == 6:
        address = address.ipv4_mapped or ip_network((address, 56), strict=False)
    return str(address)


def scheme(client, proxies: int) -> str:
    """Return http or https, as the browser sees it: a proxy may speak TLS in our stead."""
    told = client.headers.get("X-Forwarded-Proto") if proxies else None
    return (told or client.scheme).replace("ws", "http")  # a WebSocket's are ws and wss


def plain_origin(origin: str) -> str:
    """Return an origin as browsers write it: in lower case, and without the scheme's own port."""
    return re.sub("^(http://.+):80$|^(https://.+):443$", r"\1\2", origin.lower())


# ── Seat belts ───────────────────────────────────────────────────────────────────────────────────


def install(app: Quart, allowance, connections: int = 0, turn=None) -> None:
    """Put all guards in place, before serving.

    allowance() bounds pings and fragments, see Stream. One peer may have so many connections, and
    each of them waits for its turn(address); 0: the peer is a proxy, which has limits of its own.
    """
    for package, fits in FITS.items():
        if (found := version(package)) != fits:
            raise SystemExit(f"guards.py fits {package} {fits}, not {found}: see requirements.txt")

    async def headers(response: Response | None) -> Response | None:
        if response is not None:  # as it is for a WebSocket that has not been refused
            response.headers.setdefault("Cache-Control", "no-store")
            client = websocket if has_websocket_context() else request
            if scheme(client, app.config.get("PROXIES", 0)) == "https":
                response.headers["Strict-Transport-Security"] = "max-age=31536000"
        return response

    app.after_request(headers)
    app.after_websocket(headers)
    ours = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
    usual = Config.response_headers
    Config.response_headers = lambda *args: [*usual(*args), *ours]
    # Off: permessage-deflate. It takes 257 KiB instead of 41 for each connection, and 20 bombs
    # of 260 KB took 5.2 GB. Can go when Hypercorn has a setting (its issue 307).
    ws_stream.server_extensions_handshake = lambda requested, supported: None
    # One read must not hide thousands of tiny frames.
    tcp_server.MAX_RECV = 4096
    Stream.allowance = staticmethod(allowance)
    Server.most, Server.turn = connections, staticmethod(turn)
    http_1.WSStream = Stream
    protocol.H11Protocol = Protocol
    serving.TCPServer = Server
    app.asgi_websocket_class = Connection
    app.websocket_class = Socket


def harden(listener: socket.socket) -> None:
    """Set what accepted sockets inherit: a peer that never reads, or has vanished, is soon gone.

    In 20 to 25 s on Linux. Without, such a peer blocks send for ever, and close behind it.
    """
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in {
        "TCP_USER_TIMEOUT": 20_000,  # milliseconds without an acknowledgement
        "TCP_KEEPIDLE": 20,  # seconds
        "TCP_KEEPINTVL": 5,
        "TCP_KEEPCNT": 3,
    }.items():
        if hasattr(socket, option):  # Linux has them all
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    # Without, up to 4 MB that nobody reads vanish into the kernel for each, and 30 MB come from it.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)


def raise_open_files() -> int:
    """Have the system allow as many open files as it can; return how many. A connection is one."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return 1 << 31
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


class Server(tcp_server.TCPServer):
    """A connection: what its buffers hold is bounded, and how it ends is no news.

    Without: 1 MB waits in front of each handler that is slower than its peer, and Hypercorn logs
    a dead phone (TimeoutError) as an error of its own, with a traceback. 3,300 connections of one
    peer, with requests that never end, took 216 MB.
    """

    open: ClassVar[Counter[str]] = Counter()  # connections by peer
    most: int  # of one peer, see install

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.writer.transport.set_write_buffer_limits(0)  # wait as soon as the kernel's is full
        self.reader._limit = 8_192  # reads nothing more while twice that waits

    async def run(self) -> None:
        peer = (self.writer.get_extra_info("peername") or ("",))[0]
        if self.most and self.open[peer] >= self.most:
            return self.writer.transport.abort()
        self.open[peer] += 1
        try:
            if self.most:
                async with self.turn(counted(peer)):
                    pass  # wait for it
            with suppress(OSError):
                await super().run()
        finally:
            self.open[peer] -= 1
            if not self.open[peer]:
                del self.open[peer]

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()  # or whoever has gone would be counted for 5 s more


HOST = re.compile(rb"[\w-]{1,63}(\.[\w-]{1,63})*\.?(:\d{1,5})?|\[[\da-fA-F:.]+\](:\d{1,5})?")


class Requests(h11.Connection):
    """Refuses what fails in Hypercorn, Quart or Werkzeug with a traceback: targets such as `?` or
    `http://[`, paths longer than a file's name can be, Hosts such as `..`, `Upgrade: \\xff`. And
    bodies: no request here has one, so that nobody has to wait for its end."""

    def next_event(self):
        # To parse 3,700 headers takes 10 ms: count them before.
        if self.their_state is h11.IDLE and self.trailing_data[0].count(b"\n") > 100:
            raise h11.RemoteProtocolError("too many headers", error_status_hint=431)
        event = super().next_event()
        if isinstance(event, h11.Request):
            path = event.target.partition(b"?")[0]
            fine = path.startswith(b"/") and len(path) < 256 and len(event.target) < 2_000
            for name, value in event.headers:
                fine &= name != b"host" or (len(value) < 64 and bool(HOST.fullmatch(value)))
                fine &= name != b"transfer-encoding" and (
                    name != b"content-length" or value == b"0"
                )
                fine &= value.isascii() or not name.startswith((b"sec-", b"connection", b"upgrade"))
            if not fine:
                raise h11.RemoteProtocolError("not a request of any browser", error_status_hint=400)
        return event


class Protocol(http_1.H11Protocol):
    """Speaks HTTP/1.1 only. Browsers speak HTTP/2 with the proxy, and with it one connection could
    hold a hundred WebSockets."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        limit = self.config.h11_max_incomplete_size
        self.connection = Requests(h11.SERVER, max_incomplete_event_size=limit)

    async def _check_protocol(self, event: h11.Request) -> None:
        pass


class Connection(ASGIWebsocketConnection):
    """Quart's queue of received frames has no bound: 300 MB sent to a busy handler cost 371 MB."""

    def __init__(self, app: Quart, scope) -> None:
        super().__init__(app, scope)
        self.queue = asyncio.Queue(8)  # with 2 the server takes a third fewer messages a second

    async def send_data(self, send, data: str | bytes) -> None:
        await send({"type": "websocket.send", "text" if isinstance(data, str) else "bytes": data})


class Socket(Websocket):
    """Quart sleeps and accepts again for each frame, and above sends a signal; all that is not needed."""

    async def send(self, data: str) -> None:
        await self._send(data)


@lru_cache(maxsize=4)
def text_frame(text: str) -> bytes:
    """Return text as a WebSocket frame (RFC 6455, 5.2). A hand-out sends the same to all members, so
    that it is built once; the few last ones are remembered."""
    payload = text.encode()
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 0x81, size) + payload
    if size < 65_536:
        return struct.pack("!BBH", 0x81, 126, size) + payload
    return struct.pack("!BBQ", 0x81, 127, size) + payload


class Violation(NamedTuple):
    """What the application is given in place of a frame, when the peer has broken a rule. It is the
    application that ends the connection: the same rule then has the same consequence everywhere."""

    code: int
    reason: str


class Stream(ws_stream.WSStream):
    """A WebSocket that bounds what a peer can make it do.

    Without: after 1009 the buffer grew on (180 MB sent, 170 MB taken), and one connection with
    empty pings or one-byte fragments at 440 kB/s made everybody else wait for 12 s.
    """

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.frames = self.allowance()
        self.broken = False  # a rule: nothing more is taken in

    async def app_send(self, message) -> None:
        ready = self.state is ws_stream.ASGIWebsocketState.CONNECTED and not self.closed
        if message and "text" in message and ready:
            await self.send(Data(stream_id=self.stream_id, data=text_frame(message["text"])))
        else:
            await super().app_send(message)
            if self.broken and message and message["type"] == "websocket.close":
                await self.send(StreamClosed(stream_id=self.stream_id))  # waits for no answer

    async def handle(self, event) -> None:
        if self.broken and isinstance(event, Data):
            return
        if isinstance(event, StreamClosed) and self.app_put:
            queue = self.app_put.__self__
            if queue.full():  # then nobody may be reading it any more, and to wait for room
                while not queue.empty():  # in it would be to wait for ever
                    queue.get_nowait()
        await super().handle(event)

    async def _handle_events(self) -> None:
        """Do as Hypercorn 0.18.0 does, and look at each event before it takes effect."""
        for event in self.connection.events():
            if self.closed or self.broken:
                return
            # Messages are counted where they are read; this is what the application never sees.
            if not isinstance(event, Message) or event.frame_finished > event.message_finished:
                if self.frames.left() < 1:
                    return await self.report(1008, "You sent too many pings or fragments.")
                self.frames.spend(1)
            if isinstance(event, Message):
                if self.buffer.length + len(event.data) > self.buffer.max_length:
                    return await self.report(1009, "That frame was too large.")
                self.buffer.extend(event)
                if event.message_finished:
                    await self.app_put(self.buffer.to_message())
                    self.buffer.clear()
            elif isinstance(event, Ping):
                await self._send_wsproto_event(event.response())
            elif isinstance(event, CloseConnection):
                await self._send_wsproto_event(event.response())
                await self.send(StreamClosed(stream_id=self.stream_id))

    async def report(self, code: int, reason: str) -> None:
        self.broken = True
        self.buffer.clear()
        await self.app_put({"type": "websocket.receive", "bytes": Violation(code, reason)})
