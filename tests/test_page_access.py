"""The page, in a real browser, for everybody: by ear, by keyboard, on a phone, in all colours."""

import re
from pathlib import Path

import pytest
from conftest import enters, peer, scroll_up, shows, violations, writes
from playwright.async_api import expect

COLOURS = {"runOnly": ["color-contrast", "link-in-text-block"]}
# What has to be scrolled sideways, and is not code: the page itself, a dialog, a list.
SIDEWAYS = """[...document.querySelectorAll(":not(pre)")].filter((e) => e.scrollWidth > e.clientWidth
    && (e === document.documentElement || getComputedStyle(e).overflowX === "auto")).map((e) => e.id)"""


async def test_a_screen_reader_is_read_what_is_new_and_not_the_history(tab, join, line):
    ann = await join("Ann")
    await writes(ann, "before")
    bob = await tab(at=line)
    for page in (ann, bob):
        await page.clock.install()
    await ann.reload()
    await enters(bob, "Bob")
    for page in (ann, bob):
        await page.wait_for_selector("#live[aria-live=off] .message")  # being put in, unread
        await page.clock.fast_forward(1000)
        await page.wait_for_selector("#live[aria-live=polite]")
    await bob.evaluate(
        """() => {
            window.added = [];
            new MutationObserver((records) => setTimeout(() => added.push(...records.flatMap(
                (record) => [...record.addedNodes].filter((n) => n.isConnected)
                    .map((n) => n.innerText))))).observe(
                document.getElementById("log"), {childList: true});
        }"""
    )
    line.cut()
    await writes(ann, "missed")
    await shows(bob, "missed")
    assert [text.split("\n")[-1] for text in await bob.evaluate("added")] == ["missed"]


@pytest.mark.parametrize("width", [360, 1440])
async def test_no_page_and_no_state_keeps_anybody_out(server, tab, join, line, width):
    """axe-core's rules for WCAG 2.2 AA, on all that there is to be seen."""

    async def check(page, state: str) -> None:
        for scheme, rules in ("light", {}), ("dark", COLOURS):  # the others are blind to colours
            await page.emulate_media(color_scheme=scheme)
            assert not await violations(page, **rules), (state, scheme)

    ann = await tab("/", viewport={"width": width, "height": 740})
    for path in ("/", "/r/KWR4TN", "/join?code=x", "/r/PARTY2"):
        await ann.goto(f"http://127.0.0.1:{server.port}{path}")
        await check(ann, path)
    await ann.fill("#name", "x" * 30)
    await ann.press("#name", "Enter")
    await shows(ann, "at most 24", "#unusable")
    await check(ann, "unusable name")
    await enters(ann, "Ann")
    if width < 700:
        await ann.click("#presence summary")
    bob = await tab(at=line)
    await enters(bob, "Bob")
    await writes(bob, "see `code`, https://a.example and\n```\nmore code\n```")
    await writes(ann, "my `code`, https://a.example")
    await shows(ann, "my")
    await bob.fill("#text", "I am")
    await shows(ann, "Bob", "#typing")
    await ann.evaluate(
        r"""() => { for (const li of document.querySelectorAll("#log .message"))
            for (let hue = 0; hue < 16; hue++) {
                const other = li.cloneNode(true);
                delete other.dataset.seq;
                other.className = li.className.replace(/hue-\d+/, "hue-" + hue);
                li.parentNode.append(other);
            }
        }"""
    )
    await check(ann, "talk, in all colours")
    await ann.evaluate(
        "document.querySelectorAll('#log .message:not([data-seq])').forEach((li) => li.remove())"
    )
    line.cut(up=False)
    await shows(ann, "Bob (reconnecting)", "#people")
    await check(ann, "somebody is reconnecting")
    await writes(bob, "into the void")
    await shows(bob, "Reconnecting", "#status")
    await check(bob, "reconnecting")
    await bob.context.close()
    bob = await join("Bob")
    for number in range(3):
        await writes(bob, "line\n" * 20 + f"of {number}")
    await shows(ann, "of 2")
    await scroll_up(ann)
    await writes(bob, "new")
    await shows(ann, "1 new", "#new")
    await check(ann, "something is new")
    await ann.fill("#text", "x" * 2001)
    await check(ann, "too long")
    await ann.click("#new")
    await check(ann, "what is new is marked")
    await ann.click("#wire-open")
    await writes(bob, "on the wire")
    await ann.wait_for_selector("#wire-frames .in")
    for summary in await ann.locator("#wire-desk summary").all():
        await summary.click()
    await check(ann, "wire view")
    await ann.click("#wire-close")
    await ann.click("#open-invite")
    await check(ann, "inviting")
    await ann.keyboard.press("Escape")
    if not await ann.is_visible("#people"):
        await ann.click("#presence summary")
    await ann.click("#people button")
    await check(ann, "what to do about Bob")
    await ann.keyboard.press("Escape")
    await bob.click("#leave")
    await check(bob, "left")
    await shows(ann, "Bob 2 left")
    await ann.click("#leave")
    await check(ann, "the last one is asked")


async def test_a_phone_has_room_for_fingers_and_nothing_sticks_out(join):
    ann = await join("W" * 24, viewport={"width": 360, "height": 640}, has_touch=True)
    for text in ("x" * 500, "```\n" + "x" * 500 + "\n```"):
        await ann.fill("#text", text)
        await ann.click("#send")
    await ann.click("#presence summary")
    await shows(ann, "xxx")
    assert await ann.evaluate(SIDEWAYS) == []
    small = """() => [...document.querySelectorAll("button, input, textarea, summary, .button")]
        .filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 44)
        .map((e) => e.outerHTML)"""
    assert await ann.evaluate(small) == []
    await ann.click("#open-invite")
    assert await ann.evaluate(small) == []
    # Browsers zoom in on a box whose letters are smaller than 16 pixels.
    fonts = """[...document.querySelectorAll("input:not([type=checkbox]), textarea")]
        .map((e) => parseFloat(getComputedStyle(e).fontSize))"""
    assert min(await ann.evaluate(fonts)) >= 16
    await ann.click("#close-invite")
    await ann.click("#leave")
    assert await ann.evaluate(small) == []
    await ann.click("#ask button >> text=Leave")
    assert await ann.evaluate(small) == []


async def test_all_of_it_can_be_done_by_keyboard(tab):
    ann = await tab("/")
    for _ in range(3):
        await ann.keyboard.press("Tab")
    await ann.keyboard.press("Enter")  # Create a room
    await ann.wait_for_selector("#name:focus")
    await ann.keyboard.type("Ann")
    await ann.keyboard.press("Enter")
    await ann.wait_for_selector("#text:focus")
    await ann.keyboard.type("hello")
    await ann.keyboard.press("Enter")
    await shows(ann, "hello")
    for _ in range(12):
        await ann.keyboard.press("Shift+Tab")
        if await ann.evaluate("document.activeElement.id") == "leave":
            break
    await ann.keyboard.press("Enter")
    await ann.keyboard.press("Enter")  # yes, though the last one
    await shows(ann, "You have left this room", "#over")


async def test_text_of_twice_the_size_fits_on_a_phone(server, tab):
    ann = await tab("/", viewport={"width": 360, "height": 740})
    twice = "document.documentElement.style.fontSize = '200%'"
    for path in ("/", "/r/KWR4TN", "/r/PARTY2"):
        await ann.goto(f"http://127.0.0.1:{server.port}{path}")
        await ann.evaluate(twice)
        assert await ann.evaluate(SIDEWAYS) == []
    await enters(ann, "Ann")
    assert await ann.evaluate(SIDEWAYS) == []
    await ann.click("#open-invite")
    assert await ann.evaluate(SIDEWAYS) == []
    await ann.click("#close-invite")
    await ann.evaluate("document.getElementById('wire-open').click()")
    await shows(ann, "open", "#wire-state")
    assert await ann.evaluate(SIDEWAYS) == []
    await expect(ann.locator("#wire-close")).to_be_in_viewport(ratio=1)


async def test_a_phone_on_its_side_has_a_log(server, join):
    ann = await join("Ann", viewport={"width": 740, "height": 360})
    assert (await ann.locator("#scroller").bounding_box())["height"] > 210
    for number in range(4):
        bob = await peer(server, f"Bob {number}")
        await writes(ann, f"Hello, Bob {number}")
    await shows(ann, "Hello, Bob 3")
    member, buttons = ann.locator("#people li").last, ann.locator("#presence .buttons")
    assert await below(buttons, member)  # and not over all but the first of them
    bob.send(typing=True)
    await shows(ann, "Bob 3", "#typing")
    assert await below(ann.locator("#typing"), ann.locator("#log li").last)


async def below(one, other) -> bool:
    one, other = await one.bounding_box(), await other.bounding_box()
    return one["y"] >= other["y"] + other["height"]


def test_browsers_of_2023_get_colours():
    """There is a Chrome 110 to see the whole page in: @sparticuz/chromium@110, from npm."""
    css = Path("static/chat.css").read_text()
    assert ": light-dark(" not in css
    scripts = "".join(Path(f"static/{name}.js").read_text() for name in ("read", "page"))
    assert not re.search(r"\.aria[A-Z]", scripts)  # old Firefox has no such properties


async def test_without_popovers_there_is_a_chat_and_no_wire_view(server, tab):
    """As browsers before 2023 have it, to which the word says nothing."""

    async def old(route):
        answer = await route.fetch()
        body = (await answer.text()).replace("popover", "unheard")
        await route.fulfill(response=answer, body=body)

    ann = await tab("/")
    await ann.route("**/chat.css*", old)
    await ann.goto(f"http://127.0.0.1:{server.port}/r/PARTY2")
    await ann.evaluate("document.getElementById('wire').removeAttribute('popover')")
    await enters(ann, "Ann")
    await writes(ann, "can be seen")
    await ann.locator("#log .message").click()  # nothing lies over it
    assert await ann.is_visible("#presence .save")
    assert not await ann.is_visible("#wire-open")
    assert not await ann.is_visible("#wire")
