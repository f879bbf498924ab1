"""The specification of the chat, as tests. Read the names; look inside where one surprises you.

Rules are tried on Quart's test client, which calls the application without a network. What a
network can do to it is tried in tests/: on a real server, in a real browser, behind a real nginx.
"""

import asyncio
import html
import re
import sys
import time

import markupsafe
import pytest
from quart.testing.connections import WebsocketDisconnectError, WebsocketResponseError

import chat
from bench.peer import start_anew

limits = chat.limits
OURS = {"Origin": "http://localhost"}  # what the page of the test client sends


class Actor:
    """Somebody with a tab: says things and hears things."""

    def __init__(self, code: str):
        self.code = code
        self.socket = chat.app.test_client().websocket(f"/r/{code}/ws", headers=OURS)
        self.unread, self.sent = "", 0
        self.id = self.token = self.name = None

    async def says(self, text: str, id: str | None = None) -> str:
        self.sent += 1
        id = id or f"n{self.sent}"
        await self.does(say=text, id=id)
        return id

    async def does(self, **frame) -> None:
        await self.socket.send_json(frame)

    async def hello(self, **hello) -> "Actor":
        await self.does(hello=hello)
        welcome = await self.hears("You are <bdi>")
        values = 'data-member="(.+?)" data-token="(.+?)" data-after="(.+?)"'
        self.id, self.token, self.after = re.search(values, welcome).groups()
        self.name = html.unescape((await self.hears("</bdi>"))[:-6])
        return self

    async def refused(self, **hello) -> int:
        """Say a hello that lets nobody in; return the close code."""
        await self.does(hello=hello)
        return await self.is_closed()

    async def leaves(self) -> int:
        await self.does(leave=True)
        return await self.is_closed()

    async def hears(self, text: str) -> str:
        """Wait until text arrives; return everything since the last call, up to its end."""
        while text not in self.unread:
            async with asyncio.timeout(2):
                self.unread += await self.socket.receive()
        end = self.unread.index(text) + len(text)
        heard, self.unread = self.unread[:end], self.unread[end:]
        return heard

    async def is_closed(self) -> int:
        """Wait for the end of the connection; return its close code."""
        try:
            async with asyncio.timeout(2):
                while True:
                    self.unread += await self.socket.receive()
        except WebsocketDisconnectError as end:
            return end.args[0]

    async def loses_connection(self) -> int:
        """Lose the connection; return the number of the last entry that was heard."""
        await self.socket.disconnect()
        await self.socket._task
        return self.last

    @property
    def last(self) -> int:
        return chat.rooms[self.code].seq


@pytest.fixture(autouse=True)
def forget():
    """Begin each test with a server that knows nobody."""
    start_anew()


@pytest.fixture
async def tab():
    """Open tabs in the room PARTY2, or another: `await tab()`."""
    open_tabs = []

    async def open_tab(code: str = "") -> Actor:
        if not code and not chat.rooms:
            chat.create_room("PARTY2")
        actor = Actor(code or "PARTY2")
        open_tabs.append(actor.socket)
        await actor.socket.__aenter__()
        return actor

    yield open_tab
    for opened in open_tabs:
        await opened.__aexit__(None, None, None)


@pytest.fixture
async def join(tab):
    """Let somebody join the room PARTY2: `ann = await join("Ann")`."""

    async def join_as(name: str) -> Actor:
        actor = await (await tab()).hello(name=name)
        await actor.hears(f"{markupsafe.escape(actor.name)}</bdi> joined")
        return actor

    return join_as


@pytest.fixture
def heart(monkeypatch):
    """Let the server's heart beat three times a second."""
    monkeypatch.setitem(limits, "BEAT", 0.3)


@pytest.fixture
def client():
    return chat.app.test_client()


# ── Rooms ────────────────────────────────────────────────────────────────────────────────────────


async def test_creating_a_room_leads_to_it(client):
    page = await (await client.get("/")).get_data(as_text=True)
    action = re.search(r'action="(/r/[2-9A-HJKMNP-Z]{6})"', page)[1]
    created = await client.post(action)
    assert (created.status_code, created.location) == (303, action)
    for address in (action, action + "/"):
        assert (await client.get(address)).status_code == 200


async def test_every_home_page_offers_another_code(client):
    pages = [await (await client.get("/")).get_data(as_text=True) for _ in range(5)]
    assert len({re.search(r"/r/(\w{6})", page)[1] for page in pages}) == 5


@pytest.mark.parametrize(
    "typed",
    ["KWR4TN", "kwr4tn", "kwr 4tn", " KWR-4TN "]
    + ["k.w.r.4.t.n", "ＫＷＲ４ＴＮ", "http://x.y/r/KWR4TN/", "http://x.y/r/KWR4TN?from=app#e1"],
)
async def test_a_code_may_be_typed_in_any_way(client, typed):
    answer = await client.get("/join", query_string={"code": typed})
    assert (answer.status_code, answer.location) == (303, "/r/KWR4TN")


@pytest.mark.parametrize(
    "typed", ["", "KWR4T", "KWR4TNN", "KWR4T0", "KWR4T!", "<script>", "ÄÖÜÄÖÜ"]
)
async def test_what_is_not_a_code_gets_a_sentence(client, typed):
    answer = await client.get("/join", query_string={"code": typed})
    page = await answer.get_data(as_text=True)
    assert answer.status_code == 400
    assert "6 letters and digits" in page
    assert "<script>" not in page


async def test_a_room_that_nobody_created_gets_a_page_that_says_what_to_do(client):
    answer = await client.get("/r/KWR4TN")
    assert answer.status_code == 404
    assert "create a room" in await answer.get_data(as_text=True)
    assert not chat.rooms


async def test_joining_never_creates_a_room(tab):
    assert await (await tab("KWR4TN")).refused(name="Ann") == 4404
    assert not chat.rooms


@pytest.mark.parametrize("code", ["kwr4tn", "KWR4T", "KWR4T0", "KWR4TNN", "%00%00%00%00%00%00"])
async def test_only_a_proper_code_can_be_created(client, code):
    assert (await client.post(f"/r/{code}")).status_code == 409
    assert not chat.rooms


async def test_to_create_a_room_that_is_there_leads_to_it(client, join):
    """As when a whole class presses "Open KWR4TN" at once."""
    await join("Ann")
    assert (await client.post("/r/PARTY2")).status_code == 303
    assert len(chat.rooms["PARTY2"].members) == 1


async def test_the_room_closes_when_the_last_member_leaves(join, client):
    ann, bob = await join("Ann"), await join("Bob")
    assert await ann.leaves() == 1000
    await bob.hears("Ann</bdi> left")
    assert "PARTY2" in chat.rooms
    assert await bob.leaves() == 1000
    assert not chat.rooms
    assert (await client.get("/r/PARTY2")).status_code == 404


async def test_a_room_that_nobody_enters_closes(client, monkeypatch):
    monkeypatch.setattr(chat, "UNENTERED", 0.05)
    await client.post("/r/KWR4TN")
    assert "KWR4TN" in chat.rooms
    await asyncio.sleep(0.1)
    assert not chat.rooms


async def test_a_code_used_again_waits_as_long_for_somebody_to_enter(tab, client, monkeypatch):
    monkeypatch.setattr(chat, "UNENTERED", 0.3)
    await client.post("/r/PARTY2")
    await (await (await tab()).hello(name="Ann")).leaves()
    await asyncio.sleep(0.2)
    await client.post("/r/PARTY2")
    await asyncio.sleep(0.2)
    assert "PARTY2" in chat.rooms


async def test_when_rooms_are_full_one_that_nobody_has_entered_makes_way(tab, client, monkeypatch):
    monkeypatch.setitem(limits, "ROOMS", 3)
    await (await tab()).hello(name="Ann")
    chat.create_room("OTHER2")  # as main does, for the terminal: it waits
    for code in ("KWR4TN", "KWR4TM"):
        assert (await client.post(f"/r/{code}")).status_code == 303
    assert list(chat.rooms) == ["PARTY2", "OTHER2", "KWR4TM"]
    await (await tab("KWR4TM")).hello(name="Bob")
    assert (await client.post("/r/KWR4TP")).status_code == 503


async def test_a_message_reaches_everyone_in_its_room_and_nobody_else(tab, join):
    ann, bob = await join("Ann"), await join("Bob")
    chat.create_room("OTHER2")
    eve = await (await tab("OTHER2")).hello(name="Eve")
    await ann.says("for the party")
    await ann.hears("for the party")
    await bob.hears("for the party")
    await eve.says("fence")
    assert "party" not in await eve.hears("fence")


# ── Presence ─────────────────────────────────────────────────────────────────────────────────────


def count(number: int) -> str:
    return f'hx-target="#count" hx-swap="innerHTML">{number}<'


async def test_everybody_sees_how_many_are_here_and_who(join):
    ann = await join("Ann")
    await ann.hears(count(1))
    bob = await join("Bob")
    assert "Bob</bdi> joined" in await ann.hears(count(2))
    await ann.hears("Bob</bdi></li>")
    await bob.does(leave=True)
    await ann.hears("Bob</bdi> left")
    await ann.hears(count(1))


async def test_who_enters_a_busy_room_sees_who_is_here_too(tab, join, monkeypatch):
    """The list of members may be due before the newcomer's snapshot: it has to come after it."""
    ann = await join("Ann")
    monkeypatch.setitem(limits, "FRAMES_PER_SECOND", 5)  # each hand-out rests for 0.2 s
    await ann.says("first")
    await ann.hears("first</div>")
    bob = await (await tab()).hello(name="Bob")
    await bob.hears(count(2))


async def test_two_anns_are_told_apart(join):
    assert (await join("Ann")).name == "Ann"
    assert (await join("ANN")).name == "ANN 2"
    assert (await join("Ａｎｎ")).name == "Ann 3"
    assert (await join("Ann 2")).name == "Ann 2 2"


async def test_a_name_is_free_again_after_its_member_has_left(join):
    ann = await join("Ann")
    await join("Bob")
    await ann.leaves()
    assert (await join("Ann")).name == "Ann"


async def test_an_unusable_name_gets_a_sentence_and_another_try(tab):
    ann = await tab()
    await ann.does(hello={"name": "a\u0000b"})  # tests/test_guards.py has more of them
    await ann.hears("unusable")
    assert "cannot be seen" in await ann.hears("</hx-partial>")
    await ann.hello(name="Ann")


async def test_a_lost_connection_is_not_a_leaving(join, monkeypatch):
    ann, bob = await join("Ann"), await join("Bob")
    await bob.loses_connection()
    await ann.hears("Bob</bdi> (reconnecting)")
    assert chat.rooms["PARTY2"].members[bob.id].outbox is None
    await ann.says("fence")
    assert "Bob left" not in await ann.hears("fence")


async def test_who_does_not_come_back_in_time_has_left(join, monkeypatch):
    monkeypatch.setitem(limits, "GRACE", 0.05)
    ann, bob = await join("Ann"), await join("Bob")
    await bob.loses_connection()
    await ann.hears("Bob</bdi> left")


async def test_who_closes_the_page_has_left_sooner(join, monkeypatch):
    monkeypatch.setattr(chat, "GRACE_CLOSED", 0.05)
    ann, bob = await join("Ann"), await join("Bob")
    await bob.does(bye=True)
    await bob.loses_connection()
    await ann.hears("Bob</bdi> left")


async def test_a_reload_is_no_leaving_even_for_the_only_member(tab, join, monkeypatch):
    monkeypatch.setattr(chat, "GRACE_CLOSED", 0.2)
    ann = await join("Ann")
    await ann.does(bye=True)
    await ann.loses_connection()
    again = await (await tab()).hello(token=ann.token, after=0)
    assert (again.id, again.name) == (ann.id, "Ann")
    await asyncio.sleep(0.3)
    await again.says("fence")
    assert "left" not in await again.hears("fence")


async def test_who_says_nothing_is_not_a_ghost(join, heart):
    ann, bob = await join("Ann"), await join("Bob")
    for _ in range(4):
        await ann.hears("#beat")
        await ann.does(here=ann.last)
    assert await bob.is_closed() == 1013
    assert chat.rooms["PARTY2"].members[bob.id].outbox is None
    await ann.says("still here")
    await ann.hears("still here")


async def test_who_does_not_say_hello_has_to_come_again(tab, monkeypatch):
    monkeypatch.setattr(chat, "JOIN_DEADLINE", 0.05)
    assert await (await tab()).is_closed() == 1013


async def test_a_hello_that_has_to_wait_is_no_silence(tab, monkeypatch):
    monkeypatch.setattr(chat, "JOIN_DEADLINE", 0.1)
    monkeypatch.setitem(limits, "BEAT", 0.05)
    ann = await tab()
    async with chat.turn("unknown"):  # the address of the test client is kept busy
        await ann.does(hello={"name": "Ann"})
        await asyncio.sleep(0.3)
    await ann.hears("You are <bdi>")


async def test_a_room_holds_only_so_many(tab, join, monkeypatch):
    monkeypatch.setitem(limits, "MEMBERS", 1)
    await join("Ann")
    assert await (await tab()).refused(name="Bob") == 4503


async def test_when_the_server_is_full_who_has_not_said_hello_makes_way(tab, join, monkeypatch):
    monkeypatch.setitem(limits, "SOCKETS", 2)
    ann, silent = await join("Ann"), await tab()
    bob = await join("Bob")
    assert await silent.is_closed() == 1013
    assert await (await tab()).is_closed() == 1013  # now it is the newest itself
    for each in (ann, bob):
        await each.says("fence")
        await bob.hears("fence")


# ── Messages ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_message_is_text_whatever_is_in_it(join):
    ann = await join("Ann <b>")
    await ann.says('<script>alert("&")</script> <hx-partial hx-target="body">')
    heard = await ann.hears("body&#34;&gt;")
    assert "&lt;script&gt;" in heard
    assert "Ann &lt;b&gt;" in heard


@pytest.mark.parametrize(
    "text",
    [
        "😀👩‍🚀🏳️‍🌈",
        "𝔘𝔫𝔦",
        "שלום, עולם",
        "مرحبا (abc) ١٢٣",
        "a\u200bb\u200d\ufeffc",
        "a\u2028b\u2029c",
        "a" + "\u0316" * 1_999,
        "x" * 2_000,
        "\t \xa0\u3000x",
        "\ufffe\uffff\U0010ffff",
        "ﷺ" * 100,
        "</div></li><script>alert(1)</script>",
        '" onmouseover="alert(1)',
        "<!--",
        "]]>",
        "&lt;&#0;",
        "{{ 7 * 7 }}",
        "{% include 'x' %}",
        "{#",
        "${7*7}",
        "%s%n",
        "'; DROP TABLE rooms;--",
        "\\0",
        *("<hx-partial hx-target='#log'>", "<title>x</title>", "javascript:alert(1)", "data:,x"),
    ],
    ids=lambda text: ascii(text)[1:30],
)
async def test_what_is_shown_is_what_was_written(join, text):
    ann, bob = await join("Ann"), await join("Bob")
    await ann.says(text)
    await bob.hears('dir="auto">')
    shown = (await bob.hears("</div></li>")).removesuffix("</div></li>")
    assert "<" not in shown
    assert html.unescape(shown) == chat.unicodedata.normalize("NFC", text)


async def test_the_longest_message_is_counted_after_nfc(join):
    ann = await join("Ann")
    await ann.says("e\u0301" * 2_000)  # one character each
    await ann.hears(f">{'é' * 2_000}</div>")


async def test_a_message_costs_what_becomes_of_it(join):
    ann = await join("Ann")
    await ann.says("http://" + "&" * 1_900)  # 2 KB, and 19 KB of HTML
    await ann.hears("</div></li>")
    assert chat.rooms["PARTY2"].members[ann.id].allowance.left() < limits["BURST"] - 19


async def test_after_many_pieces_the_rest_is_text(join):
    ann = await join("Ann")
    await ann.says("`a`" * 660)
    assert (await ann.hears("</div></li>")).count("<code>") == 50


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("see http://a.example/x.", "http://a.example/x"),
        ("(https://a.example/?q=1&r=2)", "https://a.example/?q=1&amp;r=2"),
        ("HTTPS no, https://a.example yes", "https://a.example"),
    ],
)
async def test_links_can_be_clicked(join, text, address):
    ann = await join("Ann")
    await ann.says(text)
    rel = 'target="_blank" rel="noopener noreferrer nofollow"'
    await ann.hears(f'<a href="{address}" {rel}>{address}</a>')


@pytest.mark.parametrize(
    "text", ["javascript:alert(1)", "data:text/html,x", "http://", "https://."]
)
async def test_what_only_looks_like_a_link_cannot(join, text):
    ann = await join("Ann")
    await ann.says(text)
    assert "<a " not in await ann.hears("</div></li>")


async def test_code_is_kept_exactly(join):
    ann = await join("Ann")
    await ann.says("try `x < y` and\n```\nif x:\n    http://no.link\n```\nend")
    heard = await ann.hears("end</div>")
    assert "<code>x &lt; y</code>" in heard
    assert "><code>if x:\n    http://no.link</code></pre>" in heard


async def test_the_same_message_sent_twice_is_posted_once(join):
    ann, bob = await join("Ann"), await join("Bob")
    await ann.says("only once", id="x1")
    await ann.says("only once", id="x1")  # before its echo has come: that will be the answer
    assert "confirmed" not in await ann.hears("only once</div>")
    await ann.says("only once", id="x1")
    await ann.hears('data-id="x1" data-verdict="confirmed"')
    await ann.says("fence")
    assert (await bob.hears("fence")).count("only once") == 1


async def test_two_members_may_choose_the_same_id(join):
    ann, bob = await join("Ann"), await join("Bob")
    await ann.says("from Ann", id="x1")
    await bob.says("from Bob", id="x1")
    await ann.hears("from Ann")
    await ann.hears("from Bob")


async def test_ids_are_remembered_for_long_but_not_for_ever(join, monkeypatch):
    monkeypatch.setitem(limits, "BURST", 10_000)
    ann, bob = await join("Ann"), await join("Bob")
    for number in range(chat.IDS_REMEMBERED):
        await ann.says("x", id=f"n{number}")
    for number in range(chat.IDS_REMEMBERED + 1):
        await bob.says("x", id=f"n{number}")  # which pushes out none of Ann's
    await ann.hears(f'data-id="n{chat.IDS_REMEMBERED - 1}"')
    await ann.says("again", id="n0")
    await ann.hears('data-id="n0" data-verdict="confirmed"')
    for number in range(150):
        await ann.says("x", id=f"m{number}")
    await ann.hears('data-id="m149"')
    assert len(chat.rooms["PARTY2"].members[ann.id].posted) == chat.IDS_REMEMBERED


async def test_all_members_see_the_same_order(join):
    people = [await join(name) for name in ("Ann", "Bob", "Cy")]
    for number in range(5):
        for person in people:
            await person.says(f"#{number}")
    orders = []
    for person in people:
        heard = ""
        while len(re.findall("data-id", heard)) < 15:
            heard += await person.hears("</div></li>")
        orders.append(re.findall(r'id="e(\d+)" class="message', heard))
        assert orders[-1] == sorted(orders[-1])
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("text", ["", "  \n ", "\u0000", "x" * 2001, "e\u0301" * 2001])
async def test_an_impossible_message_is_refused_with_a_sentence(join, text):
    ann = await join("Ann")
    id = await ann.says(text)
    await ann.hears(f'data-id="{id}" data-verdict="refused"')
    await ann.hears("1 to 2000 characters")


async def test_who_is_too_fast_is_read_more_slowly(join, monkeypatch):
    """Nobody is thrown out for being fast: the rest is read later, and all of it arrives, in order."""
    monkeypatch.setitem(limits, "BURST", 3)
    monkeypatch.setitem(limits, "RATE", 10)
    fast, other = await join("Fast"), await join("Other")
    before = time.monotonic()
    for number in range(9):
        await fast.says(f"#{number}")
    await other.says("in between")
    heard = await other.hears("#8<")
    assert re.findall(r">(#\d)<", heard) == [f"#{number}" for number in range(9)]
    assert heard.index("in between") < heard.index(">#5<")
    assert time.monotonic() - before > 0.5


async def test_a_large_frame_costs_more(join, monkeypatch):
    monkeypatch.setitem(limits, "RATE", 0.001)
    ann, bob = await join("Ann"), await join("Bob")
    for number in range(4):
        await ann.says(f"{number}" + "é" * 1_999, id=f"n{number}")  # 5 KB each as JSON
    await bob.says("fence")
    heard = await bob.hears("fence")
    assert len(re.findall("data-id=.n", heard)) - 1 < 4
    assert chat.rooms["PARTY2"].members[ann.id].allowance.left() < 0


async def test_to_reconnect_gives_no_new_allowance(tab, join, monkeypatch):
    monkeypatch.setitem(limits, "RATE", 0.001)
    ann = await join("Ann")
    for number in range(limits["BURST"] - 2):
        await ann.says(f"#{number}")
    await ann.hears(f"#{limits['BURST'] - 3}<")
    again = await (await tab()).hello(token=ann.token, after=ann.last)
    assert chat.rooms["PARTY2"].members[again.id].allowance.left() < 3


async def test_while_much_is_pending_its_senders_are_not_read(join, monkeypatch):
    monkeypatch.setattr(chat, "PENDING_BYTES", 2_000)
    monkeypatch.setitem(limits, "FRAMES_PER_SECOND", 50)  # each hand-out rests for 0.1 s and more
    sizes, hand_out = [], chat.hand_out

    def measured(room: chat.Room) -> None:
        sizes.append(len(room.pending))
        hand_out(room)

    monkeypatch.setattr(chat, "hand_out", measured)
    people = [await join(f"Pupil {n}") for n in range(6)]
    for person in people:
        await person.says("x" * 900)
        await person.says("y" * 900)
    for _ in range(12):
        await people[0].hears("</div></li>")
    assert 2_000 < max(sizes) < 4_000


async def test_typing_is_shown_to_all_and_remembered_by_nobody(tab, join):
    ann, bob = await join("Ann"), await join("Bob")
    before = ann.last
    await ann.does(typing=True)
    await bob.hears(f'<span data-typing="{ann.id}"><bdi>Ann</bdi></span>')
    assert ann.last == before
    cy = await (await tab()).hello(name="Cy")
    assert "data-typing" not in await cy.hears("Cy</bdi> joined")


# ── Coming back ──────────────────────────────────────────────────────────────────────────────────


async def test_a_late_joiner_sees_what_was_said(tab, join):
    ann = await join("Ann")
    await ann.says("before you came")
    await ann.hears("before you came")
    bob = await (await tab()).hello(name="Bob")
    assert "gap" not in await bob.hears("before you came")


async def test_who_comes_back_hears_exactly_what_was_missed(tab, join):
    ann, bob = await join("Ann"), await join("Bob")
    await ann.says("heard")
    await bob.hears("heard</div>")
    after = await bob.loses_connection()
    for number in range(3):
        await ann.says(f"missed {number}")
    await ann.hears("missed 2")
    again = await (await tab()).hello(token=bob.token, after=after)
    await ann.says("live")
    heard = await again.hears("live</div>")
    found = re.findall(r">(missed \d|heard|live)<", heard)
    assert found == ["missed 0", "missed 1", "missed 2", "live"]
    assert "gap" not in heard
    assert "joined" not in heard
    assert again.name == "Bob"


async def test_a_snapshot_and_what_is_pending_never_overlap(tab, join, monkeypatch):
    """What is posted, but not handed out yet, comes with the next hand-out, and only with that."""
    ann = await join("Ann")
    monkeypatch.setitem(limits, "FRAMES_PER_SECOND", 5)  # each hand-out rests for 0.2 s
    await ann.says("first")
    await ann.hears("first</div>")
    await ann.says("second")
    bob = await (await tab()).hello(name="Bob")
    await bob.says("third")
    heard = await bob.hears("third</div>")
    found = re.findall(r">(first|second|third|Bob</bdi> joined)\b", heard)
    assert found == ["first", "second", "Bob</bdi> joined", "third"]


async def test_a_hole_in_the_history_is_never_silent(tab, join, monkeypatch):
    monkeypatch.setitem(limits, "HISTORY", 2)
    ann, bob = await join("Ann"), await join("Bob")
    last = await bob.loses_connection()
    for number in range(3):
        await ann.says(f"missed {number}")
    await ann.hears("missed 2")
    for after in (last, int(bob.after)):  # as if no entry had followed the welcome
        again = await (await tab()).hello(token=bob.token, after=after)
        heard = await again.hears("missed 2")
        assert 'class="gap"' in heard
        assert "missed 0" not in heard
        assert "joined" not in heard  # Bob has been shown that
        assert heard.index("gap") < heard.index("missed 1")


async def test_what_is_pending_is_no_hole_even_if_it_is_forgotten_already(tab, join, monkeypatch):
    monkeypatch.setitem(limits, "HISTORY", 2)
    monkeypatch.setitem(limits, "FRAMES_PER_SECOND", 5)  # each hand-out rests for 0.2 s
    ann, bob = await join("Ann"), await join("Bob")
    after = await bob.loses_connection()
    await asyncio.sleep(0.5)
    for number in range(5):
        await ann.says(f"missed {number}")
    again = await (await tab()).hello(token=bob.token, after=after)
    heard = await again.hears("missed 4")
    assert "gap" not in heard
    assert heard.count("missed") == 5


async def test_history_is_bounded_by_bytes_too(join, monkeypatch):
    monkeypatch.setitem(limits, "HISTORY_BYTES", 2_000)
    ann = await join("Ann")
    for number in range(8):
        await ann.says(f"{number} " + "é" * 300)
    await ann.hears("7 é")
    room = chat.rooms["PARTY2"]
    assert sum(sys.getsizeof(entry) for _, entry in room.history) == room.history_bytes <= 2_000
    assert len(room.history) > 1


async def test_notices_push_no_message_out_of_the_history(tab, join, monkeypatch):
    monkeypatch.setitem(limits, "HISTORY", 3)
    ann = await join("Ann")
    for number in range(3):
        await ann.says(f"#{number}")
    await ann.hears("#2")
    for number in range(20):
        visitor = await join(f"visitor {number}")
        await visitor.leaves()
    bob = await (await tab()).hello(name="Bob")
    heard = await bob.hears("Bob</bdi> joined")
    assert re.findall(r">(#\d)<", heard) == ["#0", "#1", "#2"]
    assert len(chat.rooms["PARTY2"].history) == 3
    assert len(chat.rooms["PARTY2"].notices) == chat.NOTICES_REMEMBERED


async def test_a_slow_member_is_evicted_by_bytes(join, monkeypatch):
    monkeypatch.setitem(limits, "OUTBOX_BYTES", 10_000)
    monkeypatch.setitem(limits, "RATE", 1_000)
    ann, bob = await join("Ann"), await join("Bob")
    await bob.hears(count(2))
    stuck = get_stuck(bob)
    for number in range(9):
        before = stuck.bytes
        await ann.says(f"{number} " + "x" * 1_900)
        await ann.hears(f"{number} x")
        assert before <= 10_000
    assert chat.rooms["PARTY2"].members[bob.id].outbox is None
    chat.send(stuck, "x" * 10_000)  # nothing follows a Close, and nothing takes it away
    assert [end.code for end in stuck._queue] == [1013]  # what waited is let go, to be resumed


def get_stuck(actor: Actor) -> chat.Outbox:
    """Give a member an outbox that nobody empties."""
    member = chat.rooms["PARTY2"].members[actor.id]
    member.outbox = chat.Outbox("nowhere")
    member.outbox.member = member
    return member.outbox


async def test_a_long_history_comes_in_frames_of_bounded_size(tab, join, monkeypatch):
    monkeypatch.setitem(limits, "RATE", 1_000)
    ann = await join("Ann")
    for number in range(6):
        await ann.says(f"{number} " + "&" * 1_900)
    await ann.hears("5 &amp;")
    bob = await tab()
    await bob.does(hello={"name": "Bob"})
    sizes = []
    while "Bob</bdi> joined" not in bob.unread:
        bob.unread += (frame := await bob.socket.receive())
        sizes.append(len(frame))
    assert [f">{n} &amp;" in bob.unread for n in range(6)] == [True] * 6
    assert len(sizes) > 2
    assert max(sizes) <= chat.FRAME_SIZE


async def test_who_was_lost_first_makes_way_for_who_is_here(join, monkeypatch):
    monkeypatch.setitem(limits, "MEMBERS", 3)
    ann, bob, cy = await join("Ann"), await join("Bob"), await join("Cy")
    await bob.loses_connection()
    await ann.loses_connection()
    await join("Dan")
    await cy.hears("Bob</bdi> left")
    members = chat.rooms["PARTY2"].members.values()
    assert [member.name for member in members] == ["Ann", "Cy", "Dan"]


@pytest.mark.parametrize(
    ("limit", "most"),
    [("SOCKETS_PER_ADDRESS", 2), ("SOCKETS", 1)],  # in all, members may be twice the connections
)
async def test_the_lost_are_counted_too(tab, join, monkeypatch, limit, most):
    monkeypatch.setitem(limits, limit, most)
    for _ in range(2):
        await (await join("Ghost")).loses_connection()
    assert await (await tab()).refused(name="Ghost") == 4503


@pytest.mark.parametrize("after", [1, -5, 10**17, 10**400])
async def test_a_cursor_from_elsewhere_means_a_gap_and_all_of_the_history(tab, join, after):
    ann = await join("Ann")
    await ann.says("hi")
    await ann.hears("hi</div>")
    again = await (await tab()).hello(token=ann.token, after=after)
    assert 'class="gap"' in await again.hears("hi</div>")


async def test_who_says_hello_again_with_the_same_key_is_the_same_member(tab):
    """As when the welcome gets lost on a bad line; to others the key says nothing."""
    ann = await (await tab()).hello(name="Ann", key="a secret that nobody guesses")
    again = await (await tab()).hello(name="Ann", key="a secret that nobody guesses")
    assert (again.id, again.name) == (ann.id, "Ann")
    assert await ann.is_closed() == 4409
    for key in ("another secret that nobody guesses", "too short", again.id):
        assert (await (await tab()).hello(name="Ann", key=key)).id != ann.id


async def test_a_second_tab_with_the_same_token_takes_over(tab, join):
    ann = await join("Ann")
    again = await (await tab()).hello(token=ann.token, after=0)
    assert await ann.is_closed() == 4409
    await again.says("still here")
    assert "left" not in await again.hears("still here")
    assert len(chat.rooms["PARTY2"].members) == 1


@pytest.mark.parametrize(
    "damage", [lambda t: t[:-1], lambda t: "", lambda t: t[1:] + t[0], lambda t: "é"]
)
async def test_a_token_cannot_be_made_up(tab, join, damage):
    ann = await join("Ann")
    assert await (await tab()).refused(token=damage(ann.token), after=0) == 4401


async def test_a_token_is_for_one_room(tab, join):
    ann = await join("Ann")
    chat.create_room("OTHER2")
    assert await (await tab("OTHER2")).refused(token=ann.token, after=0) == 4401


async def test_a_closed_room_stays_closed_for_those_who_were_there(tab, join):
    ann = await join("Ann")
    await ann.leaves()
    chat.create_room("OTHER2")  # so that tab() does not open the room again
    assert await (await tab()).refused(token=ann.token, after=0) == 4404


async def test_after_a_restart_a_token_opens_its_room_again_without_a_word(tab, join, monkeypatch):
    ann, bob = await join("Ann"), await join("Bob")
    tokens = ann.token, bob.token
    after = ann.last
    for person in (ann, bob):
        await person.loses_connection()
    start_anew()  # what a restart does
    monkeypatch.setattr(chat, "RUN", "another")
    await asyncio.sleep(0.002)
    ann, bob = [await (await tab("PARTY2")).hello(token=token, after=after) for token in tokens]
    await ann.says("we go on")
    for person in (ann, bob):
        heard = await person.hears("we go on")
        assert heard.count('class="gap"') == 1
        assert "joined" not in heard
    assert (ann.name, bob.name) == ("Ann", "Bob")


async def test_who_has_left_and_comes_back_is_announced(tab, join, monkeypatch):
    monkeypatch.setitem(limits, "GRACE", 0.01)
    ann, bob = await join("Ann"), await join("Bob")
    after = await bob.loses_connection()
    await ann.hears("Bob</bdi> left")
    await (await tab()).hello(token=bob.token, after=after)
    await ann.hears("Bob</bdi> joined")


async def test_a_code_used_again_is_another_room(tab, join):
    ann = await join("Ann")
    await ann.leaves()
    await asyncio.sleep(0.002)  # rooms are told apart by milliseconds
    chat.create_room("PARTY2")
    assert await (await tab()).refused(token=ann.token, after=ann.last) == 4401


async def test_tokens_of_the_run_before_open_rooms_for_the_grace_only(tab, join, monkeypatch):
    ann, bob = await join("Ann"), await join("Bob")
    start_anew()
    monkeypatch.setattr(chat, "RUN", "another")
    monkeypatch.setitem(limits, "GRACE", 0.05)
    again = await (await tab("PARTY2")).hello(token=ann.token, after=0)
    await again.leaves()
    await asyncio.sleep(0.1)
    assert await (await tab("PARTY2")).refused(token=bob.token, after=0) == 4404


async def test_to_open_a_room_again_counts_as_creating_one(tab, join, monkeypatch):
    ann = await join("Ann")
    start_anew()
    monkeypatch.setattr(chat, "RUN", "another")
    monkeypatch.setitem(limits, "NEW_ROOMS", 1)
    chat.create_room("OTHER2", "unknown")
    # For who holds a token it is never the last word.
    assert await (await tab("PARTY2")).refused(token=ann.token, after=0) == 1013


async def test_who_opens_the_room_by_its_code_after_a_restart_keeps_nobody_out(
    tab, join, client, monkeypatch
):
    ann = await join("Ann")
    start_anew()
    monkeypatch.setattr(chat, "RUN", "another")
    await client.post("/r/PARTY2")
    again = await (await tab("PARTY2")).hello(token=ann.token, after=1)
    assert (again.id, again.name) == (ann.id, "Ann")
    await again.hears("The server has restarted")


@pytest.mark.parametrize("frame", [{"leave": True}, {"lock": True}])
async def test_who_is_back_first_keeps_nobody_out(tab, join, monkeypatch, frame):
    ann, bob = await join("Ann"), await join("Bob")
    start_anew()
    monkeypatch.setattr(chat, "RUN", "another")
    first = await (await tab("PARTY2")).hello(token=ann.token, after=0)
    await first.does(**frame)
    await (first.is_closed() if "leave" in frame else first.hears("locked the room"))
    assert (await (await tab("PARTY2")).hello(token=bob.token, after=0)).name == "Bob"


async def test_the_welcome_comes_before_every_answer(tab, join, monkeypatch):
    """Or a message could be called posted on a connection on which nobody has seen it."""
    ann = await join("Ann")
    monkeypatch.setitem(limits, "FRAMES_PER_SECOND", 5)  # each hand-out rests for 0.2 s
    id = await ann.says("first")
    await ann.hears("first</div>")
    again = await tab()
    await again.does(hello={"token": ann.token, "after": ann.last})
    await again.says("first", id=id)
    assert "data-member" in await again.hears("confirmed")


# ── Keeping a room in order ──────────────────────────────────────────────────────────────────────


async def test_who_has_been_here_longest_is_the_host(join):
    ann = await join("Ann")
    bob = await join("Bob")
    await bob.hears(f'data-member="{ann.id}" data-host>')
    await ann.does(leave=True)
    await bob.hears(f'data-member="{bob.id}" data-host>')


async def test_a_locked_room_lets_in_who_lost_the_connection_and_nobody_else(tab, join):
    ann, bob = await join("Ann"), await join("Bob")
    await ann.does(lock=True)
    await bob.hears("Ann</bdi> locked the room")
    await bob.hears("data-locked")
    assert await (await tab()).refused(name="Eve") == 4403
    await bob.loses_connection()
    await (await tab()).hello(token=bob.token, after=0)
    await ann.does(lock=False)
    await ann.hears("Ann</bdi> unlocked the room")
    await join("Cy")


async def test_the_host_can_remove_somebody_who_cannot_come_back(tab, join):
    ann, bob = await join("Ann"), await join("Bob")
    await ann.does(remove=bob.id)
    assert await bob.is_closed() == 4403
    await ann.hears("Bob</bdi> was removed")
    assert await (await tab()).refused(token=bob.token, after=0) == 4403
    await ann.does(remove="nobody")  # who has just left by itself
    await ann.says("fence")
    await ann.hears("fence")


async def test_who_is_not_the_host_can_neither_lock_nor_remove(join):
    ann, bob = await join("Ann"), await join("Bob")
    await bob.does(lock=True)
    await bob.does(remove=ann.id)
    await bob.says("fence")
    await ann.hears("fence")
    assert not chat.rooms["PARTY2"].locked


async def test_a_token_of_a_run_long_ago_does_not_pass_a_lock(tab, join, monkeypatch):
    eve = await join("Eve")
    start_anew()
    monkeypatch.setattr(chat, "RUN", "another")
    chat.create_room("PARTY2").start -= 1_000 * 121  # more than the grace ago
    ann = await join("Ann")
    await ann.does(lock=True)
    await ann.hears("locked the room")
    assert await (await tab()).refused(token=eve.token, after=0) == 4403


# ── Slow consumers ───────────────────────────────────────────────────────────────────────────────


async def test_who_was_evicted_can_resume_and_nobody_else_notices(tab, join, monkeypatch):
    monkeypatch.setitem(limits, "OUTBOX_BYTES", 5_000)
    ann, bob = await join("Ann"), await join("Bob")
    await bob.hears(count(2))
    after = bob.last
    get_stuck(bob)
    for number in range(4):
        await ann.says(f"line {number}" + "x" * 1_900)
        await ann.hears(f"line {number}")
    again = await (await tab()).hello(token=bob.token, after=after)
    heard = await again.hears("line 3")
    assert [f"line {number}" in heard for number in range(3)] == [True] * 3
    assert "left" not in heard


async def test_a_hand_out_that_fails_leaves_no_silent_hole(join, monkeypatch, caplog):
    ann, bob = await join("Ann"), await join("Bob")
    monkeypatch.setattr(chat, "send", lambda *_: 1 / 0)
    await ann.says("hi")
    assert (await ann.is_closed(), await bob.is_closed()) == (1013, 1013)
    assert "A hand-out failed" in caplog.text


async def test_a_heartbeat_that_fails_does_not_stop_the_heart(join, heart, monkeypatch):
    ann, bob = await join("Ann"), await join("Bob")
    send, broken = chat.send, chat.rooms["PARTY2"].members[bob.id].outbox
    heartbeat = str(chat.fragments.beat())

    def breaks(outbox, frame) -> None:
        if outbox is broken and frame == heartbeat:
            raise ZeroDivisionError
        send(outbox, frame)

    monkeypatch.setattr(chat, "send", breaks)
    for _ in range(3):
        await ann.hears("#beat")
        await ann.does(here=ann.last)
    assert await bob.is_closed() == 1013


async def test_hearts_that_began_together_do_not_beat_together_for_ever(join):
    ann = await join("Ann")
    outbox, pauses = chat.rooms["PARTY2"].members[ann.id].outbox, []
    for _ in range(30):
        outbox.next_beat.cancel()
        chat.beat(outbox)
        pauses.append(outbox.next_beat.when() - time.monotonic())
    assert 15.9 < min(pauses) < max(pauses) - 1 < 19.1


# ── Safety ───────────────────────────────────────────────────────────────────────────────────────

BAD_FRAMES = [
    "",
    "hello",
    "[]",
    "NaN",
    '"say"',
    "{}",
    '{"shout": 1}',
    '{"say": "x"}',
    '{"say": "x", "id": ""}',
    '{"say": "x", "id": "a b"}',
    '{"say": "x", "id": 1}',
    '{"say": 1, "id": "a"}',
    '{"say": "x", "id": "a", "leave": true}',
    '{"say": "\\ud800", "id": "a"}',
    '{"say": "x", "id": "' + "a" * 65 + '"}',
    '{"here": "x"}',
    '{"here": 1.5}',
    '{"here": NaN}',
    '{"here": ' + "9" * 5000 + "}",
    '{"bye": 1}',
    '{"typing": "yes"}',
    '{"leave": "yes"}',
    '{"hello": {"name": "again"}}',
    "[" * 10_000,
    '{"a":' * 3_000,
    b"\x00\x01",
]


async def test_of_two_reasons_to_end_a_connection_the_first_counts(join):
    ann = await join("Ann")
    outbox = next(iter(chat.outboxes))
    chat.hang_up(outbox, 1013, "The page comes back.")
    chat.hang_up(outbox, 1008, "It does not.")
    assert await ann.is_closed() == 1013


@pytest.mark.parametrize("frame", BAD_FRAMES, ids=lambda frame: repr(frame)[:30])
async def test_a_bad_frame_ends_its_connection_and_no_other(join, frame):
    ann, bob = await join("Ann"), await join("Bob")
    await ann.socket.send(frame)
    assert await ann.is_closed() == 1008
    await bob.hears("Ann</bdi> left")
    await bob.says("fence")
    await bob.hears("fence")


@pytest.mark.parametrize(
    "frame",
    BAD_FRAMES[:10]
    + ['{"say": "x", "id": "a"}', '{"leave": true}', '{"hello": "Ann"}', '{"hello": {}}']
    + ['{"hello": {"name": 1}}', '{"hello": {"token": "x"}}']
    + ['{"hello": {"token": "x", "after": "1"}}'],
)
async def test_the_first_frame_has_to_be_a_hello(tab, frame):
    ann = await tab()
    await ann.socket.send(frame)
    assert await ann.is_closed() == 1008


async def test_a_frame_has_a_size(join):
    ann = await join("Ann")
    await ann.says("é" * 10_000)  # 20,000 bytes, although fewer characters than the limit
    assert await ann.is_closed() == 1009


async def test_an_error_closes_with_1011_and_is_logged_once(join, monkeypatch, caplog):
    ann, bob = await join("Ann"), await join("Bob")
    monkeypatch.setattr(chat, "say", lambda *_: 1 / 0)
    await ann.says("secret words")
    assert await ann.is_closed() == 1011
    assert [record.message for record in caplog.records] == ["A connection failed"]
    assert "ZeroDivisionError" in caplog.text
    assert "secret words" not in caplog.text
    await bob.hears("Ann</bdi> (reconnecting)")


async def test_the_token_is_known_to_its_member_only(join):
    ann, bob = await join("Ann"), await join("Bob")
    await ann.says("hi")
    assert ann.token not in await bob.hears("hi</div>")
    assert ann.token != bob.token


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        ("http://chat.example", "chat.example", True),
        ("http://chat.example:8000", "chat.example:8000", True),
        ("HTTP://Chat.Example", "chat.EXAMPLE", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("https://friends.example", "chat.example", True),  # is listed in CHAT_ORIGINS
        ("http://friends.example", "chat.example", False),
        ("https://chat.example", "chat.example", False),
        ("http://chat.example:8000", "chat.example", False),
        ("http://chat.example", "chat.example:8000", False),
        ("http://evil.example", "chat.example", False),
        ("http://chat.example.evil.example", "chat.example", False),
        ("http://evilchat.example", "chat.example", False),
        ("http://chat.example/", "chat.example", False),
        ("http://chat.example@evil.example", "chat.example", False),
        ("ws://chat.example", "chat.example", False),
        ("chat.example", "chat.example", False),
        ("null", "chat.example", False),
        ("null", "null", False),
        ("", "chat.example", False),
        ("%00", "chat.example", False),
        (None, "chat.example", False),
    ],
)
async def test_only_our_own_pages_may_connect(monkeypatch, origin, host, allowed):
    monkeypatch.setitem(limits, "ORIGINS", "https://friends.example, https://b.example:444")
    headers = {"Host": host} | ({"Origin": origin} if origin is not None else {})
    chat.create_room("PARTY2")
    socket = chat.app.test_client().websocket("/r/PARTY2/ws", headers=headers)
    await socket.__aenter__()
    await socket.send_json({"hello": {"name": "Ann"}})
    if allowed:
        assert "You are" in await socket.receive()
    else:
        with pytest.raises(WebsocketResponseError) as refused:
            await socket.receive()
        assert refused.value.response.status_code == 403
    await socket.__aexit__(None, None, None)


async def test_one_address_has_only_so_many_connections(tab, join, monkeypatch):
    monkeypatch.setitem(limits, "SOCKETS_PER_ADDRESS", 2)
    ann, bob = await join("Ann"), await join("Bob")
    third = await tab()
    assert await third.is_closed() == 1013
    await ann.leaves()
    chat.quota.cache_clear()  # what ten minutes do
    cy = await join("Cy")
    await cy.says("there is room again")
    await bob.hears("there is room again")
    for person in (bob, cy, third):
        await person.loses_connection()
    assert not chat.outboxes  # whoever has gone is forgotten


async def test_one_address_creates_rooms_only_so_fast(client, monkeypatch):
    monkeypatch.setitem(limits, "NEW_ROOMS", 2)
    codes = ["KWR4TM", "KWR4TN", "KWR4TP"]
    assert [(await client.post(f"/r/{code}")).status_code for code in codes] == [303, 303, 429]
    monkeypatch.setitem(limits, "PROXIES", 1)
    elsewhere = await client.post("/r/KWR4TP", headers={"X-Forwarded-For": "192.0.2.1"})
    assert elsewhere.status_code == 303


async def guess(client, way: str, code: str) -> int:
    """Try a code in one of the ways there are; return the status, or the close code."""
    if way == "page":
        return (await client.get(f"/r/{code}")).status_code
    if way == "create":
        return (await client.post(f"/r/{code}")).status_code
    hello = {"token": "made up", "after": 0} if way == "token" else {"name": "Eve"}
    async with client.websocket(f"/r/{code}/ws", headers=OURS) as socket:
        await socket.send_json({"hello": hello})
        with pytest.raises(WebsocketDisconnectError) as end:
            await socket.receive()
        return end.value.args[0]


async def test_codes_cannot_be_guessed(join, tab, client, monkeypatch):
    """Not over HTTP, not over the WebSocket, and not half over the one and half over the other."""
    monkeypatch.setitem(limits, "WRONG_CODES", 4)
    monkeypatch.setitem(limits, "PROXIES", 1)
    chat.create_room("PARTY2")
    elsewhere = {"X-Forwarded-For": "192.0.2.1"}
    for way, answer in (("page", 404), ("name", 4404), ("page", 404), ("name", 4404)):
        assert await guess(client, way, "KWR4TN") == answer
    for code in ("KWR4TN", "PARTY2"):  # the wrong and the right one are alike now
        for way, answer in (("page", 429), ("name", 1008), ("token", 4401)):
            assert await guess(client, way, code) == answer
    assert (await client.get("/r/PARTY2", headers=elsewhere)).status_code == 200


async def test_where_somebody_is_in_the_room_nobody_is_guessing(join, client, monkeypatch):
    monkeypatch.setitem(limits, "WRONG_CODES", 2)
    await join("Teacher")
    for _ in range(5):  # one pupil tries codes
        await guess(client, "page", "KWR4TN")
    assert (await client.get("/r/KWR4TN")).status_code == 429
    assert (await client.get("/r/PARTY2")).status_code == 200
    await join("Pupil")


async def test_who_creates_a_room_gets_in_whatever_the_neighbours_have_typed(client, monkeypatch):
    monkeypatch.setitem(limits, "WRONG_CODES", 2)
    for _ in range(5):
        await guess(client, "page", "KWR4TN")
    await client.post("/r/KWR4TM")
    assert (await client.get("/r/KWR4TM")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "dest", "status"),
    [
        ("GET", "/r/KWR4TN", "image", 403),
        ("GET", "/r/KWR4TN", "iframe", 403),
        ("POST", "/r/KWR4TN", "document", 403),
        ("GET", "/r/KWR4TN", "document", 404),  # a person has followed a link
    ],
)
async def test_pages_of_other_sites_do_not_count(client, monkeypatch, method, path, dest, status):
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": dest}
    for _ in range(3):
        answer = await client.open(path, method=method, headers=headers)
        assert answer.status_code == status
    assert not chat.rooms
    assert (chat.quota.cache_info().currsize > 0) == (status == 404)


async def test_codes_cannot_be_guessed_by_creating_rooms(join, client, monkeypatch):
    monkeypatch.setitem(limits, "NEW_ROOMS", 2)
    await join("Ann")
    codes = ("PARTY2", "KWR4TN", "KWR4TM", "PARTY2", "KWR4TP")  # a wrong guess costs a room
    assert [await guess(client, "create", code) for code in codes] == [303, 303, 303, 429, 429]


async def test_a_class_that_comes_back_after_a_restart_is_not_guessing(join, client, monkeypatch):
    monkeypatch.setitem(limits, "WRONG_CODES", 1)
    for _ in range(5):  # its tokens are void without CHAT_SECRET
        assert await guess(client, "token", "KWR4TN") == 4401
    await client.post("/r/KWR4TN")
    assert (await client.get("/r/KWR4TN")).status_code == 200


async def test_joining_and_leaving_is_no_way_to_flood(tab, join, monkeypatch):
    monkeypatch.setitem(limits, "SOCKETS_PER_ADDRESS", 4)
    await join("Ann")
    for number in range(3):
        flooder = await join(f"flood {number}")
        await flooder.leaves()
    assert await (await tab()).refused(name="flood") == 4503


async def test_a_proxy_that_nobody_has_told_of_is_noted(client, caplog):
    caplog.set_level("INFO")
    for _ in range(3):
        await client.get("/", headers={"X-Forwarded-For": "192.0.2.1"})
    assert caplog.text.count("CHAT_PROXIES is 0") == 1


@pytest.mark.parametrize("path", ["//evil.example/r/KWR4TN", "//evil.example", "/r//KWR4TN"])
async def test_no_answer_leads_to_another_host(client, path):
    answer = await client.get(path, headers={"Host": "evil.example"})
    assert (answer.status_code, answer.location) == (404, None)
    answer = await client.get("/join?code=KWR4TN", headers={"Host": "evil.example"})
    assert answer.location == "/r/KWR4TN"


async def test_who_has_used_up_its_share_waits_and_nobody_else(monkeypatch):
    monkeypatch.setitem(limits, "SHARE", 0.05)
    done = []

    async def work(address: str, number: int) -> None:
        async with chat.turn(address):
            time.sleep(0.1)  # noqa: ASYNC251 - what the event loop is kept busy with
            done.append(f"{address} {number}")

    before = time.monotonic()
    busy = [asyncio.create_task(work("busy", number)) for number in range(7)]
    await work("other", 0)
    assert done.index("other 0") <= 1  # one thing of another address is in front of it, no more
    await asyncio.gather(*busy)
    assert done[-1] == "busy 6"
    assert time.monotonic() - before > 2  # 0.5 s at once, then 0.05 a second


async def test_what_happens_often_is_logged_once_a_minute(client, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setitem(limits, "WRONG_CODES", 1)
    for _ in range(5):
        await client.get("/r/KWR4TN")
    chat.note_again("CHAT_WRONG_CODES is reached")  # what a minute does
    assert [record.getMessage() for record in caplog.records] == [
        "CHAT_WRONG_CODES is reached, by unknown",
        "CHAT_WRONG_CODES is reached, 4 times in a minute",
    ]
    assert not chat.noted


async def test_an_error_is_a_page_and_logged_without_the_code(client, monkeypatch, caplog):
    monkeypatch.setattr(chat, "find_room", lambda *_: 1 / 0)
    answer = await client.get("/r/KWR4TN")
    assert answer.status_code == 500
    assert "Create a room" in await answer.get_data(as_text=True)
    assert "ZeroDivisionError" in caplog.text
    assert "KWR4TN" not in caplog.text


async def test_health_is_numbers_only(join, client):
    chat.create_room("PARTY2")
    await join("Ann")
    answer = await (await client.get("/healthz")).get_json()
    assert answer == {"rooms": 1, "members": 1, "connections": 1}
