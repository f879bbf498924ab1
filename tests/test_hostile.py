"""What no honest peer sends: each row of these tables leaves the server, and two others, in peace."""

import asyncio
import itertools

import pytest
from conftest import fixture, health, hears, is_closed, peer

from bench.peer import Peer

numbers = itertools.count()


@fixture(scope="module")
async def talkers(standing):
    yield [await peer(standing, name) for name in ("Ann", "Bob")]
    await Peer.close_all()


@fixture
async def bystanders(standing, talkers):
    """Two who talk after each test, and notice nothing; nor has their server anything to say."""
    said = len(standing.complaints())
    yield standing
    for each in talkers:
        fence = f"fence {next(numbers)}"
        each.send(say=fence, id=fence.replace(" ", "-"))
        await hears(each, f">{fence}<")  # on the connection of before
    assert health(standing)["rooms"]
    assert "Traceback" not in standing.complaints()[said:]


def ask(line: str, *headers: str, host="127.0.0.1", body=b"") -> bytes:
    return "\r\n".join([line, f"Host: {host}", *headers, "", ""]).encode("latin-1") + body


@pytest.mark.parametrize("method", ["OPTIONS", "HEAD", "GET"])
@pytest.mark.parametrize(
    "path",
    ["../" * 9 + "dev/zero", "%2e%2e/" * 9 + "dev/zero", "..%2f" * 9 + "dev/zero"]
    + [
        "..\\" * 9 + "dev\\zero",
        "/dev/zero",
        "%2fdev%2fzero",
        "../chat.py",
        "missing.js",
        "vendor",
    ],
)
async def test_no_request_names_a_file(bystanders, method, path):
    """Quart answers OPTIONS by itself, and functions called after a request run on that, too."""
    before = bystanders.memory()
    reader, writer = await asyncio.open_connection("127.0.0.1", bystanders.port)
    writer.write(ask(f"{method} /static/{path} HTTP/1.1", "Connection: close"))
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    assert int(answer.split()[1]) in ((200, 404) if method == "OPTIONS" else (404,))
    assert b"import" not in answer
    assert bystanders.memory() - before < 10_000_000


UPGRADE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")


KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="


ROOM, MAKE, PAGE = "GET /r/PARTY2/ws HTTP/1.1", "POST /r/KWR4TN HTTP/1.1", "GET / HTTP/1.1"


HTTP_2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")


HANDSHAKES = {
    "no upgrade": ask(ROOM),
    "no key": ask(ROOM, *UPGRADE),
    "an empty key": ask(ROOM, *UPGRADE, "Sec-WebSocket-Key:"),
    "half of the upgrade": ask(ROOM, *UPGRADE[:1], KEY),
    "the other half": ask(ROOM, *UPGRADE[1:], KEY),
    "no version": ask(ROOM, *UPGRADE[:2], KEY),
    "version 12": ask(ROOM, *UPGRADE[:2], KEY, "Sec-WebSocket-Version: 12"),
    "version \xff": ask(ROOM, *UPGRADE[:2], KEY, "Sec-WebSocket-Version: \xff"),
    "HTTP/1.0": ask("GET /r/PARTY2/ws HTTP/1.0", *UPGRADE, KEY),
    "POST": ask("POST /r/PARTY2/ws HTTP/1.1", *UPGRADE, KEY),
    "elsewhere": ask(PAGE, *UPGRADE, KEY),
    "nowhere": ask("GET /nowhere HTTP/1.1", *UPGRADE, KEY),
    "a body": ask(ROOM, *UPGRADE, KEY, "Content-Length: 5", body=b"hello"),
    "chunks": ask(ROOM, *UPGRADE, KEY, "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "protocol \xff": ask(ROOM, *UPGRADE, KEY, "Sec-WebSocket-Protocol: ,, \xff"),
    "extension \xff": ask(ROOM, *UPGRADE, KEY, "Sec-WebSocket-Extensions: \xff; ="),
    "path %ff": ask("GET /r/%ff/ws HTTP/1.1", *UPGRADE, KEY),
    "to h2c": ask(ROOM, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: !"),
    "HTTP/2": HTTP_2,
    "HTTP/2 and garbage": HTTP_2 + bytes(range(256)) * 10,
}


REQUESTS = {
    "garbage": bytes(range(256)) * 20,
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "zeros": bytes(70_000),
    "new lines": b"\r\n" * 1000,
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/9.9": ask("GET / HTTP/9.9"),
    "64 KB of header": ask(PAGE, "X: " + "x" * 65_536),
    "5,000 headers": ask(PAGE, *["X: x"] * 5_000),
    "a folded header": ask(PAGE, "X: a", "  b"),
    "no colon": ask(PAGE, "X"),
    "a space before the colon": ask(PAGE, "X : a"),
    "a zero in a header": ask(PAGE, "X: \0"),
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": ask(PAGE, "Host: other.example"),
    "CONNECT": ask("CONNECT x:80 HTTP/1.1"),
    "length and chunks": ask(
        MAKE, "Content-Length: 4", "Transfer-Encoding: chunked", body=b"0\r\n\r\nGET /x HTTP/1.1"
    ),
    "two lengths": ask(MAKE, "Content-Length: 4", "Content-Length: 5", body=b"hello"),
    "two encodings": ask(MAKE, "Transfer-Encoding: chunked", "Transfer-Encoding: x"),
    "an encoding that nobody knows": ask(MAKE, "Transfer-Encoding: xchunked"),
    "100 KB to nowhere": ask("POST /x HTTP/1.1", "Content-Length: 100000", body=bytes(100_000)),
    "a chunk of rubbish": ask(MAKE, "Transfer-Encoding: chunked", body=b"zz\r\n"),
    "a chunk that never ends": ask(MAKE, "Transfer-Encoding: chunked", body=b"f" * 30 + b"\r\n"),
    "a chunk of 1 MB": ask(MAKE, "Transfer-Encoding: chunked", body=b"fffff\r\n" + bytes(100_000)),
    "a form that is none": ask(
        MAKE, "Content-Type: multipart/form-data", "Content-Length: 5", body=b"--x\r\n"
    ),
}


for length in ("-5", "+5", "x", "\xb2", "9" * 30, "9" * 5000):
    REQUESTS[f"length {length}"] = ask(MAKE, f"Content-Length: {length}", body=b"hello")


for host in (
    "",
    "[",
    "[::1",
    "x:y",
    "x:999999",
    "a@b",
    "a b",
    "..",
    "x" * 64,
    "\xe9",
    "<x>",
    "a/b",
):
    REQUESTS[f"Host {host}"] = ask(PAGE, host=host)
    REQUESTS[f"Host {host} to create"] = ask(MAKE, f"Origin: http://{host}", host=host)
    HANDSHAKES[f"Host {host}"] = ask(ROOM, *UPGRADE, KEY, f"Origin: http://{host}", host=host)


for target in (
    *(
        "*",
        "?",
        "x",
        "http://[",
        "http://x.example/",
        "//",
        "//x.example/",
        "/%",
        "/%zz",
        "/\\..\\..",
    ),
    *(
        "/r/../../etc/passwd",
        "/%2e%2e/etc/passwd",
        "/r/%00",
        "/r/PARTY2%0d%0aX:y",
        "/r//ws",
        "/r/\xff",
    ),
    *("/" + "a" * 60_000, "/r/" + "a" * 300, "/r/%F0%9F%98%80", "/join?code=%00", "/join?code=%ff"),
    *(
        "/join?code=//x.example/KWR4TN",
        "/join?code=K%0d%0aX",
        "/join?code=" + "9" * 10_000,
        "/join?%",
    ),
    *(
        "/static/../chat.py",
        "/static/%2e%2e/chat.py",
        "/static/..%2fchat.py",
        "/static//etc/passwd",
    ),
    *("/static/%2fetc%2fpasswd", "/static/%00", "/static/" + "a" * 300, "/static/" + "a/" * 3_000),
    *("/static/", "/static/vendor", "/static/%ff", "/static/chat.css/x", "/static/..\\chat.py"),
):
    REQUESTS[f"GET {target}"] = ask(f"GET {target} HTTP/1.1")


for method in ("FOO", "PUT", "DELETE", "TRACE", "OPTIONS", "HEAD", "PATCH", "POST", "get", "<>"):
    for path in ("/", "/join", "/r/PARTY2", "/healthz", "/r/PARTY2/ws", "/static/chat.css", "/x"):
        REQUESTS[f"{method} {path}"] = ask(f"{method} {path} HTTP/1.1", "Content-Length: 0")


for header in (
    *("Range: bytes=-1", "Range: bytes=9-1", "Range: bytes=a-b", "Range: bytes=" + "0-," * 2_000),
    *("If-Modified-Since: Mon, 99 Foo 99999 99:99:99 GMT", 'If-None-Match: "', "If-Range: x"),
    *("Expect: x", 'Cookie: "\\777"', "Accept-Language: \xff", "X-Forwarded-For: \xff, ::::"),
    *("X-Forwarded-Proto: \xff", 'Forwarded: for="', "Authorization: Basic !", "User-Agent: \xff"),
):
    REQUESTS[header] = ask("GET /static/chat.css HTTP/1.1", header)
    REQUESTS[f"{header} for a page"] = ask(PAGE, header)


@pytest.mark.parametrize(
    "request_bytes",
    [pytest.param(row, id=ascii(name)[1:40]) for name, row in (HANDSHAKES | REQUESTS).items()],
)
async def test_no_request_is_answered_with_an_error_of_ours(bystanders, request_bytes):
    reader, writer = await asyncio.open_connection("127.0.0.1", bystanders.port)
    writer.write(request_bytes)
    async with asyncio.timeout(8):
        answer = await reader.read(65_536)
    writer.transport.abort()
    assert not answer.startswith(b"HTTP/1.1 500")
    assert b"root:" not in answer
    assert b"import chat" not in answer


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        pytest.param(b"\x81\x05hello", 1002, id="not masked"),
        pytest.param(b"\xc1\x80\0\0\0\0", 1002, id="a reserved bit"),
        pytest.param(b"\x83\x80\0\0\0\0", 1002, id="a reserved opcode"),
        pytest.param(b"\x8b\x80\0\0\0\0", 1002, id="a reserved opcode for control"),
        pytest.param(b"\x89\xfe\0\x7e\0\0\0\0" + bytes(126), 1002, id="a ping of 126 bytes"),
        pytest.param(b"\x09\x80\0\0\0\0", 1002, id="half a ping"),
        pytest.param(b"\x80\x80\0\0\0\0", 1002, id="the continuation of nothing"),
        pytest.param(b"\x01\x80\0\0\0\0\x81\x80\0\0\0\0", 1002, id="a text within a text"),
        pytest.param(b"\x81\xfe\0\x05\0\0\0\0hello", 1002, id="a length too wide"),
        pytest.param(b"\x81\xff\x80" + bytes(11), 1002, id="a length of 2^63"),
        pytest.param(b"\x81\xff\x40" + bytes(20_000), 1009, id="a length of 2^62"),
        pytest.param(b"\x81\x81\0\0\0\0\xff", 1007, id="not UTF-8"),
        pytest.param(b"\x81\x81\0\0\0\0\xc3", 1007, id="half a character"),
        pytest.param(b"\x01\x81\0\0\0\0\xc3\x80\x81\0\0\0\0(", 1007, id="not UTF-8, split"),
        pytest.param(b"\x81\x83\0\0\0\0\xed\xa0\x80", 1007, id="half an emoji"),
        pytest.param(b"\x81\x82\0\0\0\0\xc0\xaf", 1007, id="a character too long"),
        pytest.param(b"\x88\x81\0\0\0\0\x03", 1002, id="close, one byte"),
        pytest.param(b"\x88\x82\0\0\0\0\x03\xe7", 1002, id="close 999"),
        pytest.param(b"\x88\x82\0\0\0\0\x03\xee", 1002, id="close 1006"),
        pytest.param(b"\x88\x82\0\0\0\0\xff\xff", 1002, id="close 65535"),
        pytest.param(b"\x88\x83\0\0\0\0\x03\xe8\xff", 1007, id="close, reason not UTF-8"),
    ],
)
async def test_a_frame_that_breaks_the_protocol_ends_its_connection_and_no_other(
    bystanders, frame, code
):
    eve = await Peer.connect(bystanders.port, "PARTY2")
    eve.send(hello={"name": "Eve"})
    await hears(eve, "data-token")
    eve.writer.write(frame)
    assert await is_closed(eve) == code
