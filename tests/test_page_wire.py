"""The page, in a real browser: the wire view, which shows the frames and breaks the line."""

import json

import pytest
from conftest import agree, enters, hears, messages, peer, settings, shows, violations, writes


async def shows_the_wire(page):
    await page.click("#wire-open")
    await page.wait_for_selector("#wire-frames .line:has-text('open')")
    return page


async def rows_with(page, *words: str):
    """Wait for a frame with all these words in the wire view; return the rows of all that have them."""
    rows = page.locator("#wire-frames li")
    for word in words:
        rows = rows.filter(has_text=word)
    await rows.first.wait_for()
    return rows


async def frames(page, *words: str) -> list[str]:
    return await (await rows_with(page, *words)).all_inner_texts()


async def on_the_line(row) -> list[str]:
    """Return the bytes of a frame, as the list has them, and then as they are explained."""
    explained = row.locator(".frame div").filter(visible=True)
    await row.locator("summary").click()
    assert await explained.count() >= 3
    return [
        await row.locator("summary code").inner_text(),
        *[" ".join((await part.inner_text()).split()) for part in await explained.all()],
    ]


async def test_the_wire_view_is_loaded_when_it_is_asked_for(tab):
    ann = await tab()
    asked = []
    ann.on("request", lambda request: asked.append(request.url.split("?")[0].rsplit("/", 1)[-1]))
    await enters(ann, "Ann")
    await ann.reload()
    await ann.wait_for_selector("[data-state=connected]")
    assert "chat.js" in asked and "wire.js" not in asked
    assert not await ann.is_visible("#wire")
    await shows_the_wire(ann)
    for button in ("#wire-open", "#wire-open"):  # away, and back
        await ann.click(button)
    assert await ann.is_visible("#wire")
    assert asked.count("wire.js") == 1
    await ann.wait_for_selector("#wire-close:focus")
    await ann.click("#open-invite")
    await ann.keyboard.press("Escape")  # closes the dialog, and only that
    await ann.wait_for_selector("#invite", state="hidden")
    assert await ann.is_visible("#wire")
    await ann.focus("#wire-close")
    await ann.keyboard.press("Escape")
    await ann.wait_for_selector("#wire", state="hidden")
    await ann.wait_for_selector("#wire-open:focus")
    assert ann.errors == []


async def test_the_wire_view_shows_the_frames_of_both_directions_but_no_token(server, join):
    ann, bob = await join("Ann"), await peer(server, "Bob")
    await shows_the_wire(ann)
    await writes(ann, "<b>Grüße</b>")
    size = len((await frames(ann, "↑ out", "say, id …"))[0].split("\n")[-1].encode())
    await frames(ann, "↑ out", f"{size} bytes", '{"say":"<b>Grüße</b>"')
    seq = await ann.get_attribute("#log .mine", "data-seq")
    await frames(ann, "↓ in", f"entry …{seq[-4:]}", "ms from say to echo")
    await shows(ann, "ms from say to echo", "#wire-trip")
    await ann.click("#wire-plug")
    for word in ("one", "two", "three"):
        bob.send(say=word, id=word)
    await hears(bob, "three")
    await ann.click("#wire-plug")
    await frames(ann, "↑ out", f"hello, after …{seq[-4:]}", "token", "••••••")
    first, last = (f"…{(int(seq) + more) % 10_000:04}" for more in (1, 3))
    await frames(ann, "↓ in", f"welcome, entries {first} to {last}", "ms from hello to welcome")
    bob.send(leave=True)
    await frames(ann, "presence")
    stored = json.loads(await ann.evaluate("sessionStorage.getItem('PARTY2')"))
    await ann.evaluate("send({ hello: { name: 'Ann', key: stored.key } })")  # a frame too late
    await frames(ann, "↑ out", "hello", "key", "••••••")
    panel = await ann.locator("#wire").evaluate("panel => panel.outerHTML")
    for secret in (stored["me"]["token"], stored["key"]):
        assert secret not in panel
    assert ann.errors == []


async def test_the_wire_view_keeps_the_last_200_frames_and_can_be_paused(join):
    ann = await shows_the_wire(await join("Ann"))
    hear = "for (let i = 0; i < 300; i++) socket.dispatchEvent(new MessageEvent('message', {data: `<i>${i}</i>`}))"
    await ann.evaluate(hear)
    await frames(ann, "<i>299</i>")
    assert await ann.locator("#wire-frames li").count() == 200
    position = "document.getElementById('wire-scroller').scrollTop"
    await ann.click("#wire-pause")
    await ann.evaluate("document.getElementById('wire-scroller').scrollTop = 0")
    await writes(ann, "not followed")
    await frames(ann, "not followed", "↓ in")
    assert await ann.evaluate(position) < 500
    await ann.click("#wire-pause")
    assert await ann.evaluate(position) > 5000


async def test_whoever_pulls_the_plug_misses_nothing(join):
    ann, bob = await join("Ann"), await join("Bob")
    await shows_the_wire(ann)
    await ann.click("#wire-plug")
    await shows(ann, "reconnecting, try 2 in", "#wire-state")  # the first has failed
    await frames(ann, "closed with 1006: no close frame came")
    await ann.wait_for_selector("[data-code='1006'][aria-current=true]", state="attached")
    await writes(ann, "into the void")
    await writes(bob, "meanwhile")
    await shows(bob, "Ann (reconnecting)", "#people")
    await ann.click("#wire-plug")
    await shows(ann, "open", "#wire-state")
    await shows(bob, "into the void")
    await agree(ann, bob, "meanwhile", "into the void")
    assert await ann.locator("#unsent li, #log .gap").count() == 0
    await ann.click("#wire-plug")  # and who closes the panel has the plug in again
    await ann.click("#wire-close")
    await ann.wait_for_selector("[data-state=connected]")


@settings(CHAT_BEAT="1")
async def test_the_server_lets_go_of_whoever_freezes_and_nothing_is_lost(join):
    ann, bob = await join("Ann"), await join("Bob")
    await shows_the_wire(ann)
    await ann.click("#wire-freeze")
    await writes(ann, "frozen")
    await shows(ann, "the server lets go within", "#wire-state")
    await frames(ann, "↑ held", "say", "frozen")
    await frames(ann, "↓ in", "heartbeat")
    assert await messages(bob) == []
    await frames(ann, "closed with 1013: you were too slow or silent")
    await shows(bob, "frozen")
    assert await ann.get_attribute("#wire-freeze", "aria-pressed") == "false"
    await agree(ann, bob, "frozen")
    assert await ann.locator("#unsent li").count() == 0


async def test_whoever_thaws_in_time_says_what_was_held_back(join):
    ann, bob = await join("Ann"), await join("Bob")
    await shows_the_wire(ann)
    await ann.click("#wire-freeze")
    await writes(ann, "first")
    await writes(ann, "second")
    await writes(bob, "fence")
    await shows(ann, "fence")
    assert await ann.locator("#unsent li").count() == 2
    await ann.click("#wire-freeze")
    await shows(bob, "second")
    await shows(ann, "second")
    assert await messages(ann) == await messages(bob) == ["fence", "first", "second"]
    await ann.click("#wire-freeze")
    await ann.click("#leave")
    await shows(bob, "Ann left")  # at once: a leaving is not held back


async def test_who_freezes_while_the_line_is_down_comes_back_all_the_same(join):
    ann = await join("Ann")
    await shows_the_wire(ann)
    for id in ("wire-plug", "wire-plug", "wire-freeze"):
        await ann.evaluate(f"document.getElementById('{id}').click()")
    await frames(ann, "↓ in", "welcome")  # a hello held back would end the talk, with 1008
    await ann.wait_for_selector("[data-state=connected]")


async def test_what_is_sent_twice_is_shown_once(join):
    ann, bob = await join("Ann"), await join("Bob")
    await shows_the_wire(ann)
    await ann.click("#wire-twice")
    await writes(ann, "hear, hear")
    await frames(ann, "↓ in", "verdict on …", ": confirmed")
    one, two = await frames(ann, "↑ out", "hear, hear")
    assert one.split("\n")[-1] == two.split("\n")[-1]  # the id too
    await agree(ann, bob, "hear, hear")
    assert len(await frames(ann, "↑ out", "fence")) == 1
    assert await ann.locator("#unsent li").count() == 0


async def test_nothing_of_the_browser_is_replaced_by_the_wire_view(tab):
    ann = await tab()
    await ann.evaluate("window.before = [WebSocket, WebSocket.prototype.send, setTimeout]")
    await shows_the_wire(await enters(ann, "Ann"))
    assert await ann.evaluate(
        "[WebSocket, WebSocket.prototype.send, setTimeout].every((now, i) => now === before[i])"
    )
    assert await ann.evaluate("Object.hasOwn(socket, 'send')")


async def test_the_words_that_were_said_come_first(server, join):
    ann, bob = await join("Ann"), await peer(server, "Bob")
    await shows_the_wire(ann)
    bob.send(say="Is it <b>cold</b>?", id="x1")
    heard = (await frames(ann, "↓ in", "cold"))[0]
    assert heard.startswith("↓ in\nBob: Is it <b>cold</b>?\nentry …")
    assert heard.index("entry …") < heard.index('<li id="e')
    await writes(ann, "not yet")
    assert (await frames(ann, "↑ out", "say", "not yet"))[0].startswith("↑ out\nnot yet\nsay, id")
    bob.send(leave=True)
    assert (await frames(ann, "↓ in", "Bob left"))[0].startswith("↓ in\nBob left")


async def test_a_frame_is_explained_on_its_bytes(join):
    ann = await join("Ann")
    await shows_the_wire(ann)
    await writes(ann, "é")
    said = await rows_with(ann, "↑ out", '"say":"é"')
    size = len((await said.locator(".data").inner_text()).encode())
    assert size < 126
    line, first, second, key, payload = await on_the_line(said)
    assert line == f"81 {0x80 + size:02x} ?? ?? ?? ?? …"
    assert first.startswith("81 1 FIN") and "0001 opcode: 1 is text" in first
    assert second.startswith(f"{0x80 + size:02x} 1 MASK")
    assert second.endswith(f"{size:07b} payload length: {size}")
    assert key.startswith("?? ?? ?? ?? the mask: 4 random bytes")
    assert payload.startswith(f"7b 22 73 61 79 22 3a … the payload, {size} bytes")
    echo = await rows_with(ann, "↓ in", "Ann: é")
    size = len((await echo.locator(".data").text_content()).encode())
    line, first, second, length, payload = await on_the_line(echo)
    assert line == f"81 7e {size >> 8:02x} {size & 255:02x} 3c 6c 69 20 69 64 3d …"
    assert second.startswith("7e 0 MASK") and second.endswith("1111110 payload length: 126")
    assert length.startswith(f"{size >> 8:02x} {size & 255:02x} the length itself")
    await ann.evaluate(
        "socket.dispatchEvent(new MessageEvent('message', {data: 'x'.repeat(65536)}))"
    )
    longest = await rows_with(ann, "65536 bytes")
    assert (await on_the_line(longest))[0].startswith("81 7f 00 00 00 00 00 01 00 00 78 78")
    await join("Bob")  # or Leave would ask
    await ann.click("#leave")
    close = await rows_with(ann, "closed with 1000")
    line, first, *_ = await on_the_line(close)
    assert line.startswith("88 ") and " 03 e8 " in line  # 1000
    assert "1000 opcode" in first


@pytest.mark.parametrize(
    "size, line", [(125, "81 7d 78"), (126, "81 7e 00 7e 78"), (65_535, "81 7e ff ff 78")]
)
async def test_the_length_of_a_frame_takes_the_bytes_it_needs(join, line, size):
    ann = await join("Ann")
    await shows_the_wire(ann)
    await ann.evaluate(
        f"socket.dispatchEvent(new MessageEvent('message', {{data: 'x'.repeat({size})}}))"
    )
    assert (await on_the_line(await rows_with(ann, f"{size} bytes")))[0].startswith(line)


@settings(CHAT_BEAT="1")
async def test_heartbeat_typing_and_presence_can_be_left_out(join):
    ann, bob = await join("Ann"), await join("Bob")
    await shows_the_wire(ann)
    await bob.fill("#text", "I am")
    await writes(ann, "talk")
    for kind, words in (
        ("heartbeat", ("↓ in", "heartbeat")),
        ("heartbeat", ("↑ out", "here, after …")),
        ("typing", ("↓ in", "Bob", "typing")),
    ):
        row = (await rows_with(ann, *words)).first
        await ann.uncheck(f"#wire-{kind}")
        assert not await row.is_visible()
        await ann.check(f"#wire-{kind}")
        assert await row.is_visible()
    for kind in ("heartbeat", "typing", "presence"):
        await ann.uncheck(f"#wire-{kind}")
    await bob.context.close()
    await writes(ann, "fence")
    await frames(ann, "↓ in", "fence")
    shown = ann.locator("#wire-frames li.in:visible .words")
    assert await shown.all_inner_texts() == ["Ann: talk", "Ann: fence"]
    await ann.evaluate(
        """socket.dispatchEvent(new MessageEvent("message", { data:
            '<li data-seq="1">Cyd joined</li><hx-partial hx-target="#people"></hx-partial>' }))"""
    )
    await frames(ann, "Cyd joined", "presence, entry …1")  # it has an entry, too
    await ann.check("#wire-presence")
    await frames(ann, "↓ in", "Ann, Bob", "presence")
    assert ann.errors == []


async def test_a_frame_that_is_read_does_not_move_away(join):
    ann = await join("Ann")
    await shows_the_wire(ann)
    await writes(ann, "to be read")
    await (await rows_with(ann, "↓ in", "to be read")).locator("summary").click()
    await ann.wait_for_selector("#wire-pause[aria-pressed=true]")


async def test_the_first_frames_are_seen_by_pulling_the_plug_twice(join):
    ann = await join("Ann")
    await shows_the_wire(ann)
    await frames(ann, "pull the plug twice")
    await ann.click("#wire-plug")
    await ann.click("#wire-plug")
    await frames(ann, "connecting")
    await frames(ann, "the server has said 101")
    await frames(ann, "↑ out", "hello, after")
    await frames(ann, "↓ in", "welcome")


async def test_the_wire_view_says_why_the_chat_has_a_heartbeat_of_its_own(join):
    ann = await join("Ann")
    await shows_the_wire(ann)
    await ann.get_by_text("The heartbeat").click()
    await shows(ann, "a browser cannot send a ping", "#wire-desk")
    await shows(ann, "every 20 s, or a little sooner, the server sends one", "#wire-desk")
    await shows(ann, "hears nothing for 50 s", "#wire-desk")
    assert await ann.get_attribute("#wire", "data-silence") == "50.0"


async def test_one_can_write_while_watching_on_every_screen(join):
    ann = await join("Ann")
    await shows_the_wire(ann)
    for width, height in (
        (360, 740),
        (360, 420),  # with the keyboard on the screen
        (740, 360),
        (768, 1024),
        (1440, 900),
        (1920, 1080),
    ):
        await ann.set_viewport_size({"width": width, "height": height})
        await writes(ann, f"written at {width} by {height}")
        row = await rows_with(ann, "↓ in", f"written at {width} by {height}")
        assert await row.is_visible()
        await shows(ann, f"written at {width} by {height}")
        assert await ann.evaluate("document.documentElement.scrollWidth") == width
        write = await ann.locator("#composer").bounding_box()
        panel = await ann.locator("#wire").bounding_box()
        beside = write["x"] + write["width"] <= panel["x"]
        below = panel["y"] + panel["height"] <= write["y"]
        assert beside or below
        assert write["y"] + write["height"] <= height
        scroller = await ann.locator("#wire-scroller").bounding_box()
        assert scroller["height"] >= 100


async def test_the_letters_of_the_wire_view_grow_with_the_window(join):
    ann = await join("Ann")
    await shows_the_wire(ann)
    await writes(ann, "from the back row")
    row = await rows_with(ann, "↓ in", "from the back row")
    size = "words => parseFloat(getComputedStyle(words).fontSize)"
    sizes = []
    for width in (360, 1440, 1920):
        await ann.set_viewport_size({"width": width, "height": 1080})
        sizes.append(await row.locator(".words").evaluate(size))
    assert sizes[0] >= 16 and sizes[2] >= 20
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_in_the_wire_view(join, scheme):
    ann = await join("Ann")
    await ann.emulate_media(color_scheme=scheme)
    await shows_the_wire(ann)
    await ann.click("#wire-freeze")
    await writes(ann, "held back")
    await ann.click("#wire-freeze")
    await (await rows_with(ann, "↓ in", "held back")).locator("summary").click()
    for summary in await ann.locator("#wire-desk summary").all():
        await summary.click()
    for width in (360, 1440):
        await ann.set_viewport_size({"width": width, "height": 800})
        assert not await violations(ann)
        small = """[...document.querySelectorAll("#wire :is(button, summary, label)")]
            .filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 44)
            .map((e) => e.outerHTML)"""
        assert await ann.evaluate(small) == []
