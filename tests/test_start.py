"""Starting, stopping and settings: the program as it is run."""

import asyncio
import re
import runpy
import signal
import sys
import time
import tomllib

import pytest
import zxingcpp
from conftest import hears, is_closed, peer, program, settings

import chat
from bench.peer import HERE, Server


@settings()
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_it_stops_at_once_with_a_hundred_open_sockets_and_says_why(server, number):
    people = [await peer(server, f"member {n}") for n in range(100)]
    started = time.monotonic()
    server.process.send_signal(number)
    assert [await is_closed(each) for each in people] == [1012] * 100
    assert await asyncio.to_thread(server.process.wait, 5) == 0
    assert time.monotonic() - started < 2


@settings()
async def test_it_stops_whatever_a_peer_does(server):
    ann, dead = await peer(server, "Ann"), await peer(server, "Dead")
    dead.stop_reading()
    for number in range(300):
        ann.send(say="x" * 2000, id=f"x{number}")
        await hears(ann, f'data-id="x{number}"')
    started = time.monotonic()
    server.process.terminate()
    assert await asyncio.to_thread(server.process.wait, 6) == 0
    assert time.monotonic() - started < 5


BLOCKS = {" ": (0, 0), "▀": (255, 0), "▄": (0, 255), "█": (255, 255)}


async def test_a_class_is_shown_the_address_as_a_qr_code():
    """With --host 0.0.0.0, which here is made to be the loopback all the same."""
    code = (
        "import chat, socket, sys; sys.argv += ['--host', '0.0.0.0']; make = socket.create_server;"
    )
    code += "socket.create_server = lambda at, **o: make(('127.0.0.1', at[1]), **o); chat.main()"
    server = Server(code)
    link = re.search(r"http://\S+", server.process.stdout.readline().decode())[0]
    rows = []
    while set(line := server.process.stdout.readline().decode().rstrip("\n")) <= set(BLOCKS):
        for half in (0, 1):
            pixels = bytes(BLOCKS[block][half] for block in line for _ in range(4))
            rows += [pixels] * 4
        if "▀" * len(line) == line:
            break
    image = memoryview(b"".join(rows)).cast("B", (len(rows), len(rows[0])))
    assert [code.text for code in zxingcpp.read_barcodes(image)] == [link]
    assert re.search(rf":{server.port}/r/\w{{6}}$", link)
    server.stop()


def test_a_port_in_use_is_one_sentence(shared):
    code, said = program("--port", str(shared.port))
    assert code == 1
    assert said == f"Cannot listen on 127.0.0.1, port {shared.port}: Address already in use.\n"


@pytest.mark.parametrize("arguments", [["--port", "99999"], ["--host", "256.1.1.1"]])
def test_an_address_that_cannot_be_is_one_sentence(arguments):
    code, said = program(*arguments)
    assert code == 1
    assert said.startswith("Cannot listen on")
    assert said.count("\n") == 1


@pytest.fixture
def start(monkeypatch, capsys):
    """Do as `python chat.py` does, but in this process, which has loaded the packages already."""

    def serves(coroutine) -> None:
        coroutine.close()
        pytest.fail("it has started")

    def start(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["chat.py", *arguments])
        monkeypatch.setattr(asyncio, "run", serves)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(HERE / "chat.py"), run_name="__main__")
        return end.value.code, "".join(capsys.readouterr())

    return start


@pytest.mark.parametrize("arguments", [["--prot", "1"], ["--port", "http"], ["room"]])
def test_a_wrong_option_is_explained(start, arguments):
    code, said = start(*arguments)
    assert code == 2
    assert "usage: " in said


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("MEMBERS", "many", "CHAT_MEMBERS has to be a whole number above 0, not 'many'."),
        ("MEMBERS", "true", "CHAT_MEMBERS has to be a whole number above 0, not 'true'."),
        ("MEMBERS", "1.5", "CHAT_MEMBERS has to be a whole number above 0, not '1.5'."),
        ("RATE", "fast", "CHAT_RATE has to be a number above 0, not 'fast'."),
        ("RATE", "NaN", "CHAT_RATE has to be a number above 0, not 'NaN'."),
        ("BEAT", "0", "CHAT_BEAT has to be a number above 0, not '0'."),
        ("SHARE", "inf", "CHAT_SHARE has to be a number above 0, not 'inf'."),
        ("PROXIES", "-1", "CHAT_PROXIES has to be a whole number above 0, not '-1'."),
        (
            "SECRET",
            "x" * 15,
            "CHAT_SECRET has to have 16 characters or more, or it can be guessed.",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence(start, monkeypatch, name, value, why):
    monkeypatch.setenv(f"CHAT_{name}", value)
    assert start("--port", "0") == (2, f"{why}\n")


def test_what_is_no_setting_is_said(monkeypatch):
    """It may be a slip, or be there for something else: Kubernetes sets CHAT_PORT for a `chat`."""
    monkeypatch.setenv("CHAT_MEMBRES", "40")
    _, said = program("--port", "99999")
    assert said.startswith("WARNING CHAT_MEMBRES, in the environment, is not a setting.\nCannot")


async def test_there_are_at_most_twenty_settings():
    assert len(chat.SETTINGS) <= 20


def test_every_setting_is_explained():
    code, said = program("--help")
    assert code == 0
    for name, (_, what) in chat.SETTINGS.items():
        assert re.search(rf"CHAT_{name} \(.+\): {re.escape(what)}", said)


@pytest.mark.parametrize("package", ["hypercorn", "quart", "wsproto", "h11"])
async def test_a_version_that_the_guards_do_not_fit_is_not_started(package):
    code = "import chat, guards; real = guards.version; "
    code += (
        f"guards.version = lambda name: '9.9' if name == '{package}' else real(name); chat.main()"
    )
    number, said = program("--port", "0", code=code)
    assert number == 1
    assert f"guards.py fits {package} " in said
    assert "Traceback" not in said


async def test_an_import_that_has_moved_is_one_sentence():
    code, said = program(code="import wsproto.events as e; del e.Ping; import chat")
    assert code == 1
    assert re.fullmatch(
        "cannot import name 'Ping' .+ Install what is needed: pip install .+\n", said
    )


async def test_a_missing_package_is_one_sentence():
    code, said = program(
        code="import sys; sys.path = [p for p in sys.path if 'site-' not in p]; import chat"
    )
    assert code == 1
    assert re.fullmatch(
        "No module named '.+'. Install what is needed: pip install -r requirements.txt\n", said
    )


async def test_uv_installs_what_pip_does():
    """By the metadata at the top of chat.py (PEP 723), found as uv finds it."""
    source = (HERE / "chat.py").read_text()
    block = re.search(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", source)[1]
    script = tomllib.loads(re.sub("(?m)^# ?", "", block))
    requirements = (HERE / "requirements.txt").read_text().splitlines()
    pins = [line for line in requirements if not line.startswith("#")]
    assert sorted(script["dependencies"]) == sorted(pins)
    assert script["requires-python"] == ">=3.11, <3.14"  # as tested, and as the README says


async def test_a_setting_in_the_environment_counts():
    code = "import os; os.environ['CHAT_MEMBERS'] = '40'; import chat, sys; sys.exit(chat.limits['MEMBERS'])"
    assert program(code=code)[0] == 40
