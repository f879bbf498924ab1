"""What guards.py makes of names, texts and addresses that deceive, and what bounds the memory."""

import gc
import gzip
from types import SimpleNamespace
from unicodedata import normalize

import pytest
from hypercorn.config import Config
from hypercorn.protocol.events import Data
from quart import Quart, request
from wsproto.connection import Connection, ConnectionType

import chat
import guards


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "give a name"),
        ("   ", "give a name"),
        ("\u0301", "give a name"),
        ("\ufe0f", "give a name"),
        ("a\u0000b", "cannot be seen"),
        ("a\nb", "cannot be seen"),
        ("a\u2028b", "cannot be seen"),
        ("\u202egnol", "cannot be seen"),
        ("A\u200dnn", "cannot be seen"),
        ("\u3164", "cannot be seen"),
        ("\u2800", "cannot be seen"),
        ("\ue000", "cannot be seen"),
        ("a" * 25, "at most 24"),
        ("ﷺ" * 2, "at most 24"),
        ("a\u0316\u0317\u0318", "too many marks"),
        ("\u0410nn", "two alphabets"),  # a Cyrillic A
        ("\u0391nn", "two alphabets"),  # a Greek one
        ("\ua4eenn", "two alphabets"),  # a Lisu one
        ("\u0410" + " " * 50 + "\U0001d5c7", "two alphabets"),  # Latin after NFKC
    ],
)
def test_a_name_that_cannot_be_used_gets_a_sentence(name, why):
    with pytest.raises(ValueError, match=why):
        guards.usable_name(name)


@pytest.mark.parametrize(
    "name",
    ["Ann", "O'Neil", "שרה", "محمد", "สมชาย", "प्रिया"]
    + ["Nguyễn Thị Ánh", "李雷", "🦊", "👩‍🚀", "❤️", "علی‌رضا"],
)
def test_names_of_the_world_can_be_used(name):
    assert guards.usable_name(name) == normalize("NFKC", name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\n\n  one\r\ntwo\n\n  three\n", "  one\ntwo\n\n  three"),
        ("a" + "\n" * 3 + "b" + "\n \t" * 1_000 + "\nc", "a\n\n\nb\n\nc"),  # is one empty line
        ("a\u202eb\u2066c\u0000d", "abcd"),
        ("e\u0301" * 2_000, "\u00e9" * 2_000),
        ("e\u0000\u0301", "\u00e9"),
    ],
    ids=["new lines", "a screen full of nothing", "overrides of the direction", "NFC", "NFC, late"],
)
def test_what_nobody_could_see_is_left_out_and_the_rest_stays(text, shown):
    assert guards.clean(text) == shown


@pytest.mark.parametrize(
    ("proxies", "peer", "told", "address"),
    [
        (0, "192.0.2.1", None, "192.0.2.1"),
        (0, "192.0.2.1", "198.51.100.1", "192.0.2.1"),  # anybody can say so
        (1, "127.0.0.1", "198.51.100.1", "198.51.100.1"),
        (1, "127.0.0.1", "203.0.113.9, 198.51.100.1", "198.51.100.1"),
        (2, "127.0.0.1", "203.0.113.9, 198.51.100.1", "203.0.113.9"),
        (2, "127.0.0.1", "made up, 203.0.113.9, 198.51.100.1", "203.0.113.9"),
        (2, "127.0.0.1", "198.51.100.1", "127.0.0.1"),  # fewer than there should be
        (1, "127.0.0.1", "<script>", "unknown"),
        (1, "127.0.0.1", "", "unknown"),
        (0, "2001:db8:1:2:3:4:5:6", None, "2001:db8:1::/56"),
        (0, "::ffff:192.0.2.1", None, "192.0.2.1"),
        (1, "127.0.0.1", "2001:db8:1:2::99", "2001:db8:1::/56"),
    ],
)
async def test_only_our_own_proxies_are_believed(proxies, peer, told, address):
    headers = {} if told is None else {"X-Forwarded-For": told}
    scope = {"client": (peer, 50_000)}
    async with Quart("any").test_request_context("/", headers=headers, scope_base=scope):
        assert guards.address(request, proxies) == address


async def test_behind_a_proxy_that_speaks_tls_our_pages_are_https():
    headers = {"X-Forwarded-Proto": "https"}
    for proxies, scheme in ((0, "http"), (1, "https")):
        async with Quart("any").test_request_context("/", headers=headers):
            assert guards.site(request, proxies) == f"{scheme}://localhost"


@pytest.mark.parametrize(("size", "counted"), [(1, 40), (4_000, 0)])
async def test_what_comes_in_a_trickle_is_counted_and_what_comes_in_large_parts_is_not(
    size, counted
):
    stream = guards.Stream(None, Config(), None, None, False, None, None, None, 1)
    stream.handshake = SimpleNamespace(accepted=True)
    stream.connection = Connection(ConnectionType.SERVER)
    stream.unseen.burst = 100  # so that it does not have to wait
    await stream.handle(Data(1, b"\x81\xff\0\0\0\0\0\x10\0\0\0\0\0\0"))  # a frame of 1 MB
    for _ in range(40):
        await stream.handle(Data(1, b"x" * size))
    assert round(100 - stream.unseen.left()) == counted


async def test_what_waits_for_a_timer_does_not_keep_its_request():
    def requests() -> int:
        gc.collect()
        return sum(isinstance(each, chat.Quart.request_class) for each in gc.get_objects())

    before = requests()
    await chat.app.test_client().post("/r/KWR4TN")
    assert requests() == before


async def test_limits_are_forgotten_and_never_fill_the_memory():
    for number in range(40_000):
        assert chat.quota("WRONG_CODES", f"192.0.2.{number}").left()
        assert chat.share_of(f"192.0.2.{number}")
    assert chat.quota.cache_info().currsize == 30_000
    assert chat.share_of.cache_info().currsize == 10_000


async def test_static_files_are_sent_packed_to_who_can_unpack_them():
    answer = await chat.app.test_client().get(
        "/static/chat.css", headers={"Accept-Encoding": "br, gzip"}
    )
    assert answer.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(await answer.get_data()) == chat.files["chat.css"].body
