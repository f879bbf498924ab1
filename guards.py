"""Seat belts for Hypercorn 0.18 and Quart 0.22 on the open internet.

chat.py is complete without this file and is better read without it. Each guard names what
happens without it, and when it can go.
"""

import asyncio
import gzip
import hashlib
import re
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address, ip_network
from pathlib import Path

import h11
from hypercorn import protocol
from hypercorn.asyncio import run as serving
from hypercorn.asyncio import tcp_server
from hypercorn.config import Config
from hypercorn.protocol import h11 as http_1
from hypercorn.protocol import ws_stream
from hypercorn.protocol.events import Data, StreamClosed
from quart import Quart, Request, Response, current_app, has_websocket_context, request, websocket
from quart.asgi import ASGIWebsocketConnection
from quart.wrappers import Websocket
from wsproto.events import CloseConnection, Message, Ping

FITS = "hypercorn==0.18.0, quart==0.22.0 and wsproto==1.3.2, as in requirements.txt"
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


@dataclass(frozen=True)
class File:
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


async def headers(response: Response | None) -> Response | None:
    """Say that nothing is to be kept unless a page says so and, over TLS, that it shall stay there."""
    if response is None:  # of a WebSocket, unless it has been refused
        return None
    if scheme() == "https":
        response.headers["Strict-Transport-Security"] = "max-age=31536000"
    response.headers.setdefault("Cache-Control", "no-store")
    return response


def client() -> Request | Websocket:
    """Return whom we are serving: a request, or a WebSocket, which starts as one."""
    return websocket if has_websocket_context() else request


def address() -> str:
    """Return the address by which limits count: the peer's or, behind proxies, what they say.

    Each proxy appends the address of its own peer to X-Forwarded-For; what stands before those
    anybody can make up. IPv6 is counted by /64: that is what one household gets.
    """
    proxies = int(current_app.config["PROXIES"])
    told = ",".join(client().headers.getlist("X-Forwarded-For")).split(",")
    peer = (client().scope.get("client") or ("",))[0]
    try:
        address = ip_address(told[-proxies].strip() if 0 < proxies <= len(told) else peer)
    except ValueError:
        return "unknown"
    if address.version == 6:
        address = address.ipv4_mapped or ip_network((address, 64), strict=False)
    return str(address)


def scheme() -> str:
    """Return http or https, as the browser sees it: a proxy may speak TLS in our stead."""
    told = client().headers.get("X-Forwarded-Proto") if current_app.config["PROXIES"] else None
    return (told or client().scheme).replace("ws", "http")  # a WebSocket's are ws and wss


def same_origin() -> bool:
    """Whether the page that opens this WebSocket is ours, or listed in CHAT_ORIGINS.

    Without, every page on the internet could do so from its visitors' browsers. Origin is the one
    header that a page cannot choose; a program has to send it, too.
    """
    origins = current_app.config["ORIGINS"].replace(",", " ").split()
    if host := client().headers.get("Host"):
        origins.append(f"{scheme()}://{host}")
    return plain(client().headers.get("Origin", "")) in map(plain, origins)


def plain(origin: str) -> str:
    """Return an origin as browsers write it: in lower case, and without the scheme's own port."""
    return re.sub("^(http://.+):80$|^(https://.+):443$", r"\1\2", origin.lower())


async def no_ranges() -> None:
    """Send files whole: on `Range: bytes=-1` Quart fails with a 500."""
    request.headers.pop("Range", None)


def install(app: Quart, allowance) -> None:
    """Put all guards in place, before serving; allowance() bounds pings and fragments, see Stream."""
    app.after_request(headers)
    app.after_websocket(headers)
    ours = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
    usual = Config.response_headers
    replace(Config, "response_headers", lambda *args: [*usual(*args), *ours])
    app.before_request(no_ranges)
    # Off: permessage-deflate. It takes 257 KiB instead of 41 for each connection, and 20 bombs
    # of 260 KB took 5.2 GB. Can go when Hypercorn has a setting (its issue 307).
    replace(ws_stream, "server_extensions_handshake", lambda requested, supported: None)
    # One read must not hide thousands of tiny frames.
    replace(tcp_server, "MAX_RECV", 4096)
    Stream.allowance = staticmethod(allowance)
    for place, name, guard in (
        (http_1, "WSStream", Stream),
        (protocol, "H11Protocol", Protocol),
        (serving, "TCPServer", Server),
        (app, "asgi_websocket_class", Connection),
        (app, "websocket_class", Socket),
    ):
        for method in vars(guard).keys() - {"__module__", "__doc__", "allowance", "drop"}:
            check(guard.__base__, method)
        replace(place, name, guard)


def replace(place, name: str, value) -> None:
    """Set what Hypercorn or Quart has under this name; without it, the guard would be in vain."""
    check(place, name)
    setattr(place, name, value)


def check(place, name: str) -> None:
    if not hasattr(place, name):
        place = getattr(place, "__qualname__", getattr(place, "__name__", place))
        raise SystemExit(f"{place} has no {name}: guards.py does not fit. Install {FITS}.")


def harden(listener: socket.socket) -> None:
    """Set what accepted sockets inherit: a peer that never reads, or has vanished, is gone in 20 s.

    Without, such a peer blocks send for ever, and close behind it.
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
    # Less of what nobody reads vanishes into the kernel: 64 KiB in place of 4 MB, and 32 in place of 30 MB.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)


class Server(tcp_server.TCPServer):
    """A connection: what its buffers hold is bounded, and how it ends is no news.

    Without: 1 MB waits in front of each handler that is slower than its peer, and Hypercorn logs
    a dead phone (TimeoutError) as an error of its own, with a traceback.
    """

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.writer.transport.set_write_buffer_limits(0)  # wait as soon as the kernel's is full
        self.reader._limit = 8_192  # reads nothing more while twice that waits

    async def run(self) -> None:
        with suppress(OSError):
            await super().run()


HOST = re.compile(rb"[\w-]{1,63}(\.[\w-]{1,63})*\.?(:\d{1,5})?|\[[\da-fA-F:.]+\](:\d{1,5})?")


class Requests(h11.Connection):
    """Refuses what fails in Hypercorn, Quart or Werkzeug with a traceback: targets such as `?` or
    `http://[`, paths longer than a file's name can be, Hosts such as `..`, `Upgrade: \\xff`."""

    def next_event(self):
        event = super().next_event()
        if isinstance(event, h11.Request):
            fine = event.target.startswith(b"/") and len(event.target.partition(b"?")[0]) < 256
            for name, value in event.headers:
                fine &= name != b"host" or (len(value) < 100 and bool(HOST.fullmatch(value)))
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
    """Quart sleeps, accepts again and sends a signal for each frame; chat.py needs none of it."""

    async def send(self, data: str) -> None:
        await self._send(data)


@lru_cache(maxsize=4)
def text_frame(text: str) -> bytes:
    """Return text as a WebSocket frame (RFC 6455, 5.2). A flush sends the same to all members, so
    that it is built once; the few last ones are remembered."""
    payload = text.encode()
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 0x81, size) + payload
    if size < 65_536:
        return struct.pack("!BBH", 0x81, 126, size) + payload
    return struct.pack("!BBQ", 0x81, 127, size) + payload


class Stream(ws_stream.WSStream):
    """A WebSocket that bounds what a peer can make it do.

    Without: after 1009 the buffer grew on (180 MB sent, 170 MB taken), and one connection with
    empty pings or one-byte fragments at 440 kB/s made everybody else wait for 12 s.
    """

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.frames = self.allowance()

    async def app_send(self, message) -> None:
        ready = self.state is ws_stream.ASGIWebsocketState.CONNECTED and not self.closed
        if message and "text" in message and ready:
            await self.send(Data(stream_id=self.stream_id, data=text_frame(message["text"])))
        else:
            await super().app_send(message)

    async def handle(self, event) -> None:
        if isinstance(event, StreamClosed) and self.app_put:
            queue = self.app_put.__self__
            if queue.full():  # then nobody may be reading it any more, and to wait for room
                while not queue.empty():  # in it would be to wait for ever
                    queue.get_nowait()
        await super().handle(event)

    async def _handle_events(self) -> None:
        for event in self.connection.events():
            if self.closed:
                return
            # Messages are counted where they are read; this is what the application never sees.
            fragment = isinstance(event, Message) and event.frame_finished > event.message_finished
            unseen = fragment or not isinstance(event, Message)
            if unseen and not self.frames.take():
                return await self.drop(CloseConnection(code=1008, reason="Too many frames."))
            if isinstance(event, Message):
                if self.buffer.length + len(event.data) > self.buffer.max_length:
                    return await self.drop(CloseConnection(code=1009, reason="Too large."))
                self.buffer.extend(event)
                if event.message_finished:
                    await self.app_put(self.buffer.to_message())
                    self.buffer.clear()
            elif isinstance(event, Ping):
                await self._send_wsproto_event(event.response())
            elif isinstance(event, CloseConnection):
                return await self.drop(event.response())

    async def drop(self, close: CloseConnection) -> None:
        await self._send_wsproto_event(close)
        await self.send(StreamClosed(stream_id=self.stream_id))
