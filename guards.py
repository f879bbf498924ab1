"""What strangers on the internet make necessary: chat.py is better read without it.

Token buckets, text and names that deceive, static files, response headers, addresses; and below
these the seat belts for Hypercorn 0.18 and Quart 0.22, which say what happens without them.
"""

import asyncio
import gc
import gzip
import hashlib
import re
import socket
import time
import unicodedata
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import ClassVar

import h11
from hypercorn.asyncio import run as serving
from hypercorn.asyncio import tcp_server
from hypercorn.config import Config
from hypercorn.protocol import h11 as http_1
from hypercorn.protocol import ws_stream
from hypercorn.protocol.events import Data, StreamClosed
from hypercorn.protocol.ws_stream import ASGIWebsocketState as State
from quart import Quart, request
from quart.asgi import ASGIWebsocketConnection
from wsproto.events import CloseConnection, Message, Ping
from wsproto.frame_protocol import FrameProtocol

# The classes below reach into these: each has been read in this version, and in no other.
FITS = {"hypercorn": "0.18.0", "quart": "0.22.0", "wsproto": "1.3.2", "h11": "0.16.0"}


class Allowance:
    """A token bucket: `burst` tokens at most, and `rate` new ones a second."""

    def __init__(self, rate: float, burst: float):
        self.rate, self.burst = rate, burst
        self.full_at = 0.0  # when the bucket is full again

    def left(self) -> float:
        return self.burst - max(0, self.full_at - time.monotonic()) * self.rate

    def spend(self, tokens: float) -> None:
        """Take tokens, also on credit: less than none is left then, until that is paid."""
        self.full_at = max(self.full_at, time.monotonic()) + tokens / self.rate

    async def paid(self) -> None:
        """Wait until nothing is on credit any more."""
        if (left := self.left()) < 0:
            await asyncio.sleep(-left / self.rate)


# ── Text and names ───────────────────────────────────────────────────────────────────────────────

# Never shown: control characters, and overrides of the writing direction. In names also refused:
# letters that look like nothing, and joiners but for good ones, which 👩‍🚀 needs inside. VARIANT is
# what makes no difference to the eye.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
BLANK = re.compile("[\u3164\u115f\u1160\uffa0\u2800\u034f\u17b4\u17b5\ufffc\U00016fe4\U0001d159]")
GOOD_JOINER = re.compile("(?<=[^\x00-\x7f])[\u200c\u200d](?=[^\x00-\x7f])")
VARIANT = re.compile("[\u200c\u200d\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
# A text that may have more than 30 marks in a row stays as it is: to put n of them into the order
# of NFC takes n² steps, 0.1 s for what fits into one frame.
STACKED = re.compile(r"[^\w\s\x00-\x7f]{31}")
EMPTY_LINES = re.compile("\n(?:[^\\S\n]*\n){3,}")
PIECES = re.compile(  # code blocks, code and links: re.split puts them at the odd indices
    r"""(```.*?```\n?|`[^`\n]+`|https?://(?:\([^\s<>"()]*\)|[^\s<>"()])*"""
    r"""(?:\([^\s<>"()]*\)|[^\s<>"'.,;:!?()\]}]))""",  # Foo_(bar) whole, but no bracket around it
    re.DOTALL,
)
NAME_LENGTH = 24  # characters


def clean(text: str) -> str:
    """Return a message as it will be shown: without HIDDEN and long rows of empty lines, in NFC."""
    text = HIDDEN.sub("", text)
    if not STACKED.search(text):
        text = unicodedata.normalize("NFC", text)
    return EMPTY_LINES.sub("\n\n", text.strip("\n"))


def usable_name(raw: str) -> str:
    """Return a name as it will be shown; ValueError says why it cannot be used.

    Not covered: other alphabets, and what looks alike within one, such as AIice with a capital I.
    """
    name = unicodedata.normalize("NFKC", raw[:100])  # which can make 18 characters of one
    name = re.sub(" +", " ", name.strip())
    if len(name) > NAME_LENGTH:
        raise ValueError(f"A name has at most {NAME_LENGTH} characters.")
    if not GOOD_JOINER.sub("", name).isprintable() or BLANK.search(name):
        raise ValueError("This name has characters that cannot be seen. Please leave them out.")
    kinds = "".join(unicodedata.category(character)[0] for character in GOOD_JOINER.sub("", name))
    if not set(kinds) & set("LNPS"):  # letters, numbers, punctuation, symbols
        raise ValueError("Please give a name.")
    if "MMM" in kinds:
        raise ValueError("This name has too many marks on one letter.")
    scripts = {unicodedata.name(letter, "").split(" ")[0] for letter in name if letter.isalpha()}
    if "LATIN" in scripts and scripts & {"CYRILLIC", "GREEK", "COPTIC", "CHEROKEE", "LISU"}:
        raise ValueError("This name mixes two alphabets that look alike. Use one of them.")
    return name


def look(name: str) -> str:
    return unicodedata.normalize("NFKC", VARIANT.sub("", name.casefold()))


def unlike_others(name: str, taken: list[str]) -> str:
    """Return the name, with a number if a taken one looks the same, capitals aside."""
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


class File:
    """A static file as it goes out, read at start. (Quart reads through a thread: 4 ms each.)"""

    def __init__(self, path: Path):
        self.kind, self.body = KINDS[path.suffix], path.read_bytes()
        self.packed = gzip.compress(self.body)
        # In its address, so that this changes when the file does.
        self.version = hashlib.sha256(self.body).hexdigest()[:8]

    async def response(self):
        headers = {"Content-Type": self.kind, "Vary": "Accept-Encoding"}
        if request.args.get("v") == self.version:
            headers["Cache-Control"] = "max-age=31536000, immutable"
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            return self.packed, headers | {"Content-Encoding": "gzip"}
        return self.body, headers


def read_files(folder: Path) -> dict[str, File]:
    """Return the scripts, styles and icons in a folder by their names, as in `vendor/htmx.js`."""
    paths = [path for path in folder.rglob("*.*") if path.suffix in KINDS]
    return {path.relative_to(folder).as_posix(): File(path) for path in paths}


def address(client, proxies: int) -> str:
    """Return the address by which limits count: the peer's or, behind proxies, what they say. Each
    appends the address of its own peer; what stands before those anybody can make up."""
    told = ",".join(client.headers.getlist("X-Forwarded-For")).split(",")
    peer, _ = client.scope.get("client") or ("", 0)
    return counted(told[-proxies].strip() if 0 < proxies <= len(told) else peer)


def counted(text: str) -> str:
    """Return how an address is counted: IPv6 by /56, which is what one household gets."""
    try:
        address = ip_address(text)
    except ValueError:
        return "unknown"
    if address.version == 6:
        address = address.ipv4_mapped or ip_network((address, 56), strict=False)
    return str(address)


def site(client, proxies: int) -> str:
    """Return our site as the browser calls it: a proxy may speak TLS in our stead."""
    told = client.headers.get("X-Forwarded-Proto") if proxies else None
    scheme = (told or client.scheme).replace("ws", "http")  # a WebSocket's are ws and wss
    return f"{scheme}://{client.headers.get('Host', '')}".lower()


# ── Seat belts ───────────────────────────────────────────────────────────────────────────────────


def install(app: Quart, connections: float) -> None:
    """Put the guards below in place, before serving. One peer may have so many connections."""
    for package, fits in FITS.items():
        if (found := version(package)) != fits:
            raise SystemExit(f"guards.py fits {package} {fits}, not {found}: see requirements.txt")

    ours = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
    usual = Config.response_headers
    Config.response_headers = lambda *args: [*usual(*args), *ours]
    # Off: permessage-deflate. It takes 257 KiB instead of 41 for each connection, and 20 bombs
    # of 260 KB took 5.2 GB. Can go when Hypercorn has a setting (its issue 307).
    ws_stream.server_extensions_handshake = lambda requested, supported: None
    tcp_server.MAX_RECV = 4096  # bytes of a read; of 65,536 five who flood leave 12 MB more
    Server.most = connections
    serving.TCPServer = Server
    h11.Connection = Requests
    http_1.WSStream = Stream
    app.asgi_websocket_class = Connection
    gc.freeze()  # tidy need not look through what has been imported
    gc.set_threshold(1_000_000)  # new objects, in case that there is other garbage than tidy's


def harden(listener: socket.socket) -> None:
    """Allow as many open files as can be, one for each connection; and set what these inherit.

    Without: a peer that never reads, or has vanished, blocks send for ever, and close behind it;
    and the kernel holds up to 4 MB that it does not read, and 30 MB that we do not.
    """
    with suppress(ImportError, ValueError, OSError):  # Windows has no limit, nor macOS at times
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux: gone after 20 s without an acknowledgement
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)


ended = 0  # how many connections and requests have; see tidy


def tidy() -> None:
    """Collect garbage after so many connections and requests: talk leaves none.

    Without: Python does so after every few hundred new objects, and at times goes through all there
    are: everybody waits, for 0.3 s with 2,000 members.
    """
    global ended
    ended += 1
    if ended % 500 == 0:
        gc.collect(2 if ended % 3_000 == 0 else 1)  # all generations, or the young ones


class Server(tcp_server.TCPServer):
    """A TCP connection. Without: 100 KB more wait in front of each handler that is slower than its
    peer, and 80 KB behind it; a dead phone (TimeoutError) is logged as an error of our own, with a
    traceback; and one peer has as many connections as it likes, of 12 to 24 KB each."""

    peers: ClassVar[dict["Server", str]] = {}  # of all connections, the oldest first
    most: float  # connections of one peer, see install

    async def run(self) -> None:
        self.writer.transport.set_write_buffer_limits(0)  # wait as soon as the kernel's is full
        self.reader._limit = 8_192  # reads nothing more while twice that waits
        peer = counted(self.writer.get_extra_info("peername")[0])
        mine = [each for each, its_peer in self.peers.items() if its_peer == peer]
        self.peers[self] = peer
        if len(mine) >= self.most:  # one that asks for nothing makes way, or else this one
            idle = next((each for each in mine if not each.protocol.protocol.stream), self)
            del self.peers[idle]
            idle.writer.transport.abort()
            if idle is self:
                return
        try:
            with suppress(OSError):  # which its _close raises, in place of what has ended it
                await super().run()
        finally:
            self.peers.pop(self, None)
            tidy()

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()  # or whoever has gone would be counted for 5 s more


class Requests(h11.Connection):
    """Refuses what no page sends. What fails in Hypercorn, Quart or Werkzeug with a traceback:
    targets such as `?` or `http://[`, Hosts such as `..`, `Sec-WebSocket-Protocol: \\xff`. Bodies:
    no request here has one, so that nobody has to wait for its end. And HTTP/2, in which one
    connection could hold a hundred WebSockets: browsers speak it with the proxy."""

    def next_event(self):
        # To parse 3,700 headers takes 10 ms: count them before.
        if self.their_state is h11.IDLE and self.trailing_data[0].count(b"\n") > 100:
            raise h11.RemoteProtocolError("too many headers", error_status_hint=431)
        event = super().next_event()
        if isinstance(event, h11.Request):
            headers = dict(event.headers)
            host = headers.get(b"host", b"")
            fine = (
                event.target.startswith(b"/")  # HTTP/2 begins with `*`
                and len(event.target) < 2_000  # to take a longer one apart is not charged for
                and len(host) < 64  # it is drawn as a QR code
                and all(host.split(b".")[:-1])
                and headers.get(b"content-length", b"0") == b"0"
                and b"transfer-encoding" not in headers
                and b"h2c" not in headers.get(b"upgrade", b"").lower()
                and all(v.isascii() for n, v in event.headers if n.startswith((b"sec-", b"conn")))
            )
            if not fine:
                raise h11.RemoteProtocolError("not a request of any browser", error_status_hint=400)
            tidy()
        return event


class Connection(ASGIWebsocketConnection):
    """Quart's queue of received frames has no bound: 300 MB sent to a busy handler cost 371 MB. And
    for each frame to send Quart sleeps, accepts again, and sends a signal."""

    def _create_websocket_from_scope(self, send):
        self.queue = asyncio.Queue(8)  # with 2 the server takes a third fewer messages a second
        websocket = super()._create_websocket_from_scope(send)
        websocket.send = send.__self__.send_text  # of the Stream
        return websocket


framing = FrameProtocol(client=False, extensions=[])


@lru_cache(maxsize=4)
def text_frame(text: str) -> bytes:
    """Return text as a WebSocket frame. Members are sent the same one: it is not built for each."""
    return bytes(framing.send_data(text))


class Stream(ws_stream.WSStream):
    """Gives the application what is too large cut short, for it to end the connection with 1009. And
    is slow to read what the application never sees: pings, fragments, and what comes in a trickle.

    Without: after 1009 the buffer grew on (180 MB sent, 170 MB taken), one connection with empty
    pings or one-byte fragments at 440 kB/s made everybody else wait for 12 s, and who was refused a
    handshake could stay for ever, or with a byte more fill the log with tracebacks, by 2 MB/s.
    """

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.unseen = Allowance(rate=4, burst=20)
        self.trickles = False

    async def send_text(self, text: str) -> None:
        if not self.closed:  # or asyncio would log a warning for each that comes too late
            await self.send(Data(stream_id=self.stream_id, data=text_frame(text)))

    async def handle(self, event) -> None:
        if isinstance(event, Data):
            self.trickles = len(event.data) < 1_000  # fewer than a slow line carries at once
        if isinstance(event, StreamClosed) and self.app_put:
            queue = self.app_put.__self__  # Hypercorn's, which Quart empties into Connection's
            if queue.full():  # perhaps nobody reads it any more: to wait would be to wait for ever
                while not queue.empty():
                    queue.get_nowait()
        await super().handle(event)

    async def _send_error_response(self, status_code: int) -> None:
        """Refuse a handshake, and end with it: the application, too, if that was about to accept."""
        if self.state is State.HANDSHAKE:  # else there has been an answer, and a byte after it
            await super()._send_error_response(status_code)
        await self.send(StreamClosed(stream_id=self.stream_id))

    async def _handle_events(self) -> None:
        """Do as Hypercorn 0.18.0 does, but for what is too large or too much."""
        for event in self.connection.events():
            if self.closed:
                return
            message = isinstance(event, Message)
            part = message and not event.message_finished
            if not message or (part and (event.frame_finished or self.trickles)):
                self.unseen.spend(1)
                await self.unseen.paid()
            if message:
                with suppress(ws_stream.FrameTooLargeError):
                    self.buffer.extend(event)
                if event.message_finished or self.buffer.length > self.buffer.max_length:
                    await self.app_put(self.buffer.to_message())
                    self.buffer.clear()
            elif isinstance(event, Ping):
                await self._send_wsproto_event(event.response())
            elif isinstance(event, CloseConnection):
                await self._send_wsproto_event(event.response())
                await self.send(StreamClosed(stream_id=self.stream_id))
