"""Many processes: a real nginx before four real servers."""

import asyncio
import itertools
import os
import re
import shutil
import signal
import socket
from contextlib import asynccontextmanager

import pytest
from conftest import fixture, health

import bench.peer
from bench.peer import HERE, Member, Peer


class Many(bench.peer.Many):
    """One of whose servers can be killed, and started again."""

    def create_room(self, code: str) -> int:
        """Create a room through nginx; return the number of the server that has got it."""
        before = [health(server)["rooms"] for server in self.servers]
        super().create_room(code)
        after = [health(server)["rooms"] for server in self.servers]
        grown = [number for number in range(4) if after[number] > before[number]]
        assert len(grown) == 1, f"{code} was created on {grown}"
        return grown[0]

    def kill(self, number: int) -> None:
        self.servers[number].end = signal.SIGKILL
        self.servers[number].stop()

    def start_again(self, number: int) -> None:
        """Start a server that was killed, on its old port."""
        server = self.servers[number]
        server.program = f"import sys, chat; sys.argv[-1] = '{server.port}'; chat.main()"
        server.start(**Many.SETTINGS)

    def reload(self) -> None:
        """Do as `nginx -s reload` does."""
        self.nginx.send_signal(signal.SIGHUP)


@asynccontextmanager
async def behind_nginx(folder):
    """Run four servers behind an nginx."""
    os.environ["PATH"] += ":/usr/sbin"  # where Debian has it
    if not shutil.which("nginx"):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no nginx: many are not tested")
    many = Many(folder)
    try:
        await many.start()
        yield many
    finally:
        await Peer.close_all()
        many.stop()


@fixture
async def many(tmp_path):
    async with behind_nginx(tmp_path) as many:
        yield many


@fixture(scope="module")
async def steady(tmp_path_factory):
    """One for all tests that change nothing in it."""
    async with behind_nginx(tmp_path_factory.mktemp("nginx")) as many:
        yield many


@fixture
async def visit(many):
    """Let somebody enter a room through nginx: `ann = await visit(code, "Ann")`."""
    visitors = []

    async def enter(code: str, name: str) -> Member:
        visitors.append(visitor := Member(many, code, name))
        await visitor.until(lambda visitor: name in visitor.here())
        return visitor

    yield enter
    for visitor in visitors:
        visitor.task.cancel()
    await asyncio.gather(*(visitor.task for visitor in visitors), return_exceptions=True)


NAMES = "Ann", "Bob", "Cy"


async def test_the_members_of_a_room_meet_and_the_rooms_are_spread(many, visit):
    codes = [f"MANY{a}{b}" for a in "23456789" for b in "23456789"]
    homes = [many.create_room(code) for code in codes]
    assert set(homes) == {0, 1, 2, 3}

    async def meet(code: str) -> None:
        ann, bob, cy = [await visit(code, name) for name in NAMES]
        for one, said in (ann, "hi"), (bob, "hello"), (cy, code):
            one.says(said)
            await ann.until(lambda visitor, said=said: said in visitor.log)
        for one in (ann, bob, cy):
            await one.reads("hi", "hello", code)

    await asyncio.gather(*map(meet, codes[:20]))
    for number, server in enumerate(many.servers):
        members = homes[:20].count(number) * 3
        assert health(server) == {
            "rooms": homes.count(number),
            "members": members,
            "connections": members,
        }


async def rooms_on_all(many: Many, visit) -> dict[int, list[Member]]:
    """Fill one room on each server with people who have talked; return them by server."""
    people, tries = {}, iter(itertools.product("23456789", repeat=2))
    while len(people) < 4:
        code = "MANY" + "".join(next(tries))
        home = many.create_room(code)
        if home not in people:
            people[home] = [await visit(code, name) for name in NAMES]
    for ann, bob, cy in people.values():
        ann.says("one")
        await bob.until(lambda visitor: visitor.log)
        bob.says("two")
        for one in (ann, bob, cy):
            await one.reads("one", "two")
    return people


async def test_when_a_process_dies_its_rooms_move_and_no_other_notices(many, visit):
    people = await rooms_on_all(many, visit)
    ann, bob, cy = people.pop(0)
    many.kill(0)
    ann.says("while-it-is-down")
    for one in (ann, bob, cy):
        await one.reads("one", "two", "gap", "while-it-is-down")
        await one.sees(*NAMES)
    cy.says("after")
    for one in (ann, bob, cy):
        await one.reads("one", "two", "gap", "while-it-is-down", "after")
    assert [health(server)["connections"] for server in many.servers[1:]].count(6) == 1
    for others in people.values():
        others[0].says("three")
        for one in others:
            await one.reads("one", "two", "three")
            assert one.dialled == 1


async def test_a_process_that_has_come_back_gets_no_rooms_until_a_reload(many, visit):
    """Or those who come now would be in another room than those who have been there since.

    nginx chooses for new connections only. With a short fail_timeout, whose network blinked after
    the return of the process would be there alone, under the same code, the rest "reconnecting".
    A reload ends all connections, so that all members of a room come back to the same process.
    """
    people = await rooms_on_all(many, visit)
    ann, bob, cy = people.pop(0)
    many.kill(0)
    ann.says("moved")
    for one in (ann, bob, cy):
        await one.reads("one", "two", "gap", "moved")
    many.start_again(0)
    cy.loses_connection()
    await cy.until(lambda visitor: visitor.dialled > 2)
    dan = await visit(ann.code, "Dan")
    for one in (ann, bob, cy):
        await one.sees(*NAMES, "Dan")
    cy.says("all-here")
    await dan.reads("moved", "all-here")
    assert health(many.servers[0])["connections"] == 0

    before = {one: one.dialled for one in (ann, bob, cy, dan, *itertools.chain(*people.values()))}
    many.reload()
    for one, dialled in before.items():
        await one.until(lambda visitor, dialled=dialled: visitor.dialled > dialled)
    for one in (ann, bob, cy, dan):
        await one.sees(*NAMES, "Dan")
    assert health(many.servers[0])["connections"] == 4
    dan.says("home")
    await dan.reads("moved", "all-here", "gap", "home")
    for one in (ann, bob, cy):
        await one.reads("one", "two", "gap", "moved", "all-here", "gap", "home")
    for others in people.values():  # their rooms have stayed, and their members resume
        others[0].says("three")
        for one in others:
            await one.sees(*NAMES)
            await one.reads("one", "two", "three")


async def test_whoever_comes_after_a_crash_finds_the_few_who_were_there(many, visit):
    home = many.create_room("MANY22")
    ann = await visit("MANY22", "Ann")
    many.kill(home)
    ann.says("alone")
    await ann.reads("gap", "alone")
    many.start_again(home)
    bob = await visit("MANY22", "Bob")
    await bob.reads("alone")


def test_nginx_does_not_try_a_process_again_after_ten_seconds_as_it_would_by_default():
    config = (HERE / "deploy" / "nginx-many.conf").read_text()
    upstream = config.partition("upstream chat {")[2].partition("}")[0]
    processes = re.findall(r"^ *server (127.+);", upstream, re.MULTILINE)
    assert len(processes) == 4
    assert all("fail_timeout=1y" in process for process in processes)


async def test_when_each_process_has_died_once_those_that_came_back_are_used(many, visit):
    home = many.create_room("MANY22")
    ann = await visit("MANY22", "Ann")
    for round in "abcd":
        many.kill(home)
        ann.says(round)
        await ann.until(lambda visitor: not visitor.unsent)
        many.start_again(home)
        home = [health(server)["connections"] for server in many.servers].index(1)
    bob = await visit("MANY22", "Bob")
    bob.says("found-you")
    await ann.reads("gap", "a", "gap", "b", "gap", "c", "gap", "d", "found-you")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"Upgrade: websocket\r\nSec-WebSocket-Protocol: \xff\r\n", b"101"),
        (b"Upgrade: websocket\r\nSec-WebSocket-Extensions: \xff\r\n", b"101"),
        (b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n", b"400"),
        (b"Content-Length: 20000\r\n", b"413"),
        (b"A: " + b"a" * 5000 + b"\r\n", b"400"),
    ],
)
async def test_no_request_makes_a_process_look_dead(steady, headers, status):
    with socket.create_connection(("127.0.0.1", steady.port), 10) as line:
        address = f"127.0.0.1:{steady.port}".encode()
        line.sendall(
            b"GET /r/MANY22/ws HTTP/1.1\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nHost: %b\r\nOrigin: http://%b\r\n"
            b"%b\r\n" % (address, address, headers)
        )
        assert line.recv(100).split()[1] == status
