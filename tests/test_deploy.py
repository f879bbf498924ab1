"""The proxies of deploy/, as they are but for ports and paths, before a real server."""

import asyncio
import gzip
import os
import shutil
import socket
import subprocess
import time
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest
from conftest import hears, is_closed, peer

import chat
import guards

HERE = Path(chat.__file__).parent
NGINX = """
pid nginx.pid;
error_log stderr crit;
events {}
http {
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include chat.conf;
}
"""
BELIEVE = (
    "set_real_ip_from 127.0.0.1; real_ip_header X-Forwarded-For;"  # so that a test has addresses
)

RUN_NGINX = "nginx", "-c", "nginx.conf", "-e", "stderr", "-g", "daemon off;", "-p"


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


def changed(name: str, **changes: str) -> str:
    """Return a file of deploy/ with these changes, each of which has to apply."""
    text = (HERE / "deploy" / name).read_text()
    for old, new in changes.items():
        assert old in text, f"{name} has no {old}"
        text = text.replace(old, new)
    return text


class Proxy:
    """nginx or Caddy in a process of its own, on a free port; `many` is nginx for many processes."""

    def __init__(self, folder: Path, server, program: str, changes: dict[str, str]):
        self.folder, self.port = folder, int(free_port())
        getattr(self, program)(str(server.port), changes)

    def nginx(self, server: str, changes: dict[str, str]) -> None:
        plain = {  # without TLS, and on the loopback only
            "listen 80;": f"listen 127.0.0.1:{free_port()};",
            "listen [::]:80;": "",
            "listen 443 ssl;": f"listen 127.0.0.1:{self.port};",
            "listen [::]:443 ssl;": "",
            "ssl_certificate /": "# ",
            "ssl_certificate_key": "#",
            "/var/log/nginx/error.log": "stderr",
            "127.0.0.1:8000": f"127.0.0.1:{server}",
            "/opt/chat": str(HERE),
        }
        (self.folder / "chat.conf").write_text(changed("nginx.conf", **plain | changes))
        (self.folder / "nginx.conf").write_text(NGINX)
        self.start(*RUN_NGINX, self.folder)

    def many(self, server: str, changes: dict[str, str]) -> None:
        plain = {
            f"127.0.0.1:{port}": f"127.0.0.1:{server}" for port in ("8001", "8002", "8003", "8004")
        }
        plain["listen 127.0.0.1:8080"] = f"listen 127.0.0.1:{self.port}"
        (self.folder / "nginx.conf").write_text(changed("nginx-many.conf", **plain | changes))
        self.start(*RUN_NGINX, self.folder)

    def caddy(self, server: str, changes: dict[str, str]) -> None:
        plain = {
            "\tlog {": "\tadmin off\n\tlog {",
            "chat.example": f"http://127.0.0.1:{self.port}",
            "127.0.0.1:8000": f"127.0.0.1:{server}",
            "/opt/chat": str(HERE),
        }
        (self.folder / "Caddyfile").write_text(changed("Caddyfile", **plain | changes))
        self.start("caddy", "run", "--config", self.folder / "Caddyfile")

    def start(self, *command) -> None:
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                command, stderr=log, env=os.environ | {"HOME": str(self.folder)}
            )
        deadline = time.monotonic() + 10
        while True:
            try:
                return socket.create_connection(("127.0.0.1", self.port)).close()
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.05)

    def get(self, path: str, **headers: str) -> tuple[HTTPResponse, bytes]:
        """Ask for a path, just as it is written."""
        line = HTTPConnection("127.0.0.1", self.port, timeout=5)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        line.request("GET", path, headers=headers)
        answer = line.getresponse()
        body = answer.read()
        line.close()
        return answer, body

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
async def proxies(tmp_path, server, monkeypatch):
    """Start a proxy: `proxies("nginx")`, also with changes to its configuration."""
    monkeypatch.setenv("PATH", "/usr/sbin", prepend=":")  # where Debian has nginx
    started = []

    def start(program: str, before=server, **changes: str) -> Proxy:
        needed = "caddy" if program == "caddy" else "nginx"
        if not shutil.which(needed):
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no {needed}: not tested")
        started.append(Proxy(tmp_path, before, program, changes))
        return started[-1]

    yield start
    for proxy in started:
        proxy.stop()


both = pytest.mark.parametrize("program", ["nginx", "caddy"])


@both
async def test_people_talk_through_the_proxy(server, proxies, program):
    proxy = proxies(program)
    ann, bob = [await peer(server, name, proxy.port) for name in ("Ann", "Bob")]
    ann.send(say="hi", id="x1")
    await hears(bob, 'data-id="x1"')


@both
async def test_the_proxy_sends_what_chat_py_would_send_with_its_headers(proxies, program):
    proxy = proxies(program)
    assert chat.files
    for name, file in chat.files.items():
        for encoding in "", "gzip":
            path = f"/static/{name}?v={file.version}"
            answer, body = proxy.get(path, Accept_Encoding=encoding)
            assert answer.status == 200
            packed = answer.headers["Content-Encoding"] == "gzip"
            assert (gzip.decompress(body) if packed else body) == file.body
            assert packed == (encoding == "gzip") or len(body) < 1000, name  # the icon is short
            assert answer.headers["Content-Type"] == file.kind
            assert answer.headers["Cache-Control"] == "max-age=86400"  # which chat.py does not say
            for header, value in guards.HEADERS.items():
                assert answer.headers.get_all(header) == [value], name
            assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
        assert proxy.get(f"/static/{name}")[0].headers["Cache-Control"] == "no-store"


NO_FILES = (
    "/static/nothing.js",
    "/static/screenshot-light.png",
    "/static/vendor/htmx-LICENSE",
    "/static/vendor",
    "/static/../chat.py",
    "/static/%2e%2e/chat.py",
    "/static/..%2fchat.py",
    "/static/..\\chat.py",
    "/static/../../../../../../etc/passwd",
    "/static/..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd",
    "/chat.py",
    "/.git/config",
)


@both
async def test_the_proxy_sends_no_other_file(proxies, program):
    proxy = proxies(program)
    for path in NO_FILES:
        answer, body = proxy.get(path)
        assert answer.status in (400, 404), path
        assert b"import" not in body and b"root:" not in body and b"Permission" not in body
        if answer.status == 404:  # which is the page of chat.py
            assert b"<form" in body
            assert answer.headers["Content-Security-Policy"]
            assert answer.headers.get_all("Strict-Transport-Security") == ["max-age=31536000"]


async def test_nginx_holds_so_many_connections_of_one_address(server, proxies):
    proxy = proxies("nginx", **{"chat_connections 300;": "chat_connections 3;"})
    people = [await peer(server, f"member {n}", proxy.port) for n in range(3)]
    assert proxy.get("/")[0].status == 429
    people[0].send(leave=True)
    assert await is_closed(people[0]) == 1000
    people[0].close()
    async with asyncio.timeout(5):
        while proxy.get("/")[0].status != 200:
            await asyncio.sleep(0.05)


async def test_nginx_slows_an_address_that_asks_too_fast_and_then_refuses(proxies):
    proxy = proxies(
        "nginx", **{"rate=50r/s": "rate=10r/s", "burst=1000 delay=500": "burst=4 delay=2"}
    )
    began = time.monotonic()
    assert [proxy.get("/")[0].status for _ in range(6)] == [200] * 6
    assert time.monotonic() - began > 0.2  # the first three at once, then one each 0.1 s
    lines = [HTTPConnection("127.0.0.1", proxy.port, timeout=5) for _ in range(9)]
    for line in lines:
        line.request("GET", "/")
    assert 429 in [line.getresponse().status for line in lines]
    for line in lines:
        line.close()
    name = next(iter(chat.files))  # nor does the page's own script count
    assert [proxy.get(f"/static/{name}")[0].status for _ in range(9)] == [200] * 9


@pytest.mark.parametrize("program", ["nginx", "many"])
async def test_nginx_counts_a_household_as_one(proxies, program):
    slow = {
        "rate=50r/s": "rate=1r/m",
        "burst=1000 delay=500": "burst=1 nodelay",
    }  # two, and no more
    if program == "nginx":
        slow["limit_conn_status"] = BELIEVE + " limit_conn_status"
    proxy = proxies(program, **slow)

    def status(address: str) -> int:
        return proxy.get("/", X_Forwarded_For=address)[0].status

    home = ["2001:db8:0:aa00::1", "2001:db8:0:aaff:1:2:3:a", "2001:db8:0:aa0a::10"]
    assert [status(address) for address in home] == [200, 200, 429]
    assert [status(f"2001:db8:0:ab{n}::1") for n in range(10, 13)] == [200, 200, 429]
    assert [status("192.0.2.10") for _ in range(3)] == [200, 200, 429]
    assert status("192.0.2.11") == 200
    if program == "many":  # the machine itself is not counted
        assert [proxy.get("/")[0].status for _ in range(5)] == [200] * 5


class Listener:
    """Stands in for the server, and keeps what it is asked."""

    async def start(self) -> None:
        self.server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]

    async def answer(self, reader, writer) -> None:
        self.head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()


@pytest.mark.parametrize(
    ("program", "told"), [("nginx", "127.0.0.1"), ("caddy", "127.0.0.1"), ("many", "192.0.2.7")]
)
async def test_the_server_is_told_one_address_that_a_visitor_cannot_make_up(proxies, program, told):
    """What a visitor says of it counts only where another proxy stands before, see nginx-many.conf."""
    listener = Listener()
    await listener.start()
    proxy = proxies(program, before=listener)
    headers = {
        "X_Forwarded_For": "198.51.100.1, 192.0.2.7",
        "Upgrade": "h2c",
        "Connection": "Upgrade",
        "Sec_WebSocket_Extensions": "permessage-deflate",
    }
    await asyncio.to_thread(proxy.get, "/", **headers)
    listener.server.close()
    assert f"x-forwarded-for: {told}" in listener.head
    assert "x-forwarded-proto: http" in listener.head
    assert f"host: 127.0.0.1:{proxy.port}" in listener.head
    assert not [line for line in listener.head if line.startswith("sec-websocket")]
    if program != "caddy":
        assert "upgrade: h2c" not in listener.head


def test_the_proxies_allow_what_chat_py_allows():
    for name in ("nginx.conf", "nginx-many.conf"):
        text = (HERE / "deploy" / name).read_text()
        at_most = int(text.split("limit_conn ")[1].split(";")[0].split()[1])
        assert (
            chat.limits["SOCKETS_PER_ADDRESS"] < at_most <= chat.limits["SOCKETS_PER_ADDRESS"] * 2
        )
        silence = 2.5 * chat.SETTINGS["BEAT"][0]
        assert int(text.split("proxy_read_timeout ")[1].split("s;")[0]) > silence
