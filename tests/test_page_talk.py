"""The page, in a real browser: entering a room and talking."""

import asyncio
import re

from conftest import enters, messages, settings, shows, writes
from playwright.async_api import expect


async def test_two_people_meet_and_talk(tab):
    ann = await tab("/")
    await ann.click("text=Create a room >> visible=true >> nth=-1")
    code = await ann.inner_text(".code")
    assert ann.url.endswith(f"/r/{code}")
    await enters(ann, "Ann")
    bob = await tab("/")
    await bob.fill("#code", f"{code[:3]} {code[3:]}".lower())
    await bob.press("#code", "Enter")
    await enters(bob, "Bob")
    await shows(ann, "Bob joined")
    assert await ann.inner_text("#count") == await bob.inner_text("#count") == "2"
    await writes(ann, "hi Bob\nsee https://a.example")
    await shows(bob, "hi Bob")
    await writes(bob, "<b>hi</b> Ann")
    await shows(ann, "<b>hi</b> Ann")
    await shows(bob, "<b>hi</b> Ann")  # its echo may come later than to Ann
    assert (
        await messages(ann)
        == await messages(bob)
        == ["hi Bob\nsee https://a.example", "<b>hi</b> Ann"]
    )
    assert await ann.locator("#log .mine").count() == 1
    assert await ann.locator("#unsent li").count() == 0
    await bob.click("#leave")
    await shows(bob, "You have left this room", "#over")
    await shows(ann, "Bob left")
    assert await ann.inner_text("#count") == "1"
    assert ann.errors == bob.errors == []


async def test_an_unusable_name_is_explained_and_can_be_changed(tab):
    ann = await tab()
    await ann.fill("#name", "x" * 30)
    await ann.press("#name", "Enter")
    await shows(ann, "at most 24", "#unusable")
    await enters(ann, "Ann")


async def test_whoever_is_faster_than_the_scripts_enters_all_the_same(server, tab):
    page = await tab("/")

    async def late(route):
        await asyncio.sleep(1)
        await route.continue_()

    await page.route("**/htmx-*.js", late)
    await page.goto(f"http://127.0.0.1:{server.port}/r/PARTY2", wait_until="commit")
    await page.wait_for_selector("#name:focus")  # chat.js is there, and htmx is not
    await enters(page, "Ann")


@settings(CHAT_MEMBERS="2")
async def test_a_full_room_says_so_and_can_be_tried_again(tab, join):
    ann, cy = await join("Ann"), await join("Cy")
    bob = await tab()
    await bob.fill("#name", "Bob")
    await bob.press("#name", "Enter")
    await shows(bob, "This room is full.", "#unusable")
    await ann.click("#leave")  # Cy is still there
    await shows(cy, "Ann left")
    await bob.click("text=Enter the room")
    await bob.wait_for_selector("[data-state=connected]")


async def test_entering_twice_is_entering_once(tab):
    ann = await tab()
    await ann.fill("#name", "x" * 30)
    await ann.press("#name", "Enter")
    await shows(ann, "at most 24", "#unusable")
    await ann.fill("#name", "Ann")
    await ann.evaluate(
        "for (let i = 0; i < 3; i++) document.getElementById('join').requestSubmit()"
    )
    await ann.wait_for_selector("[data-state=connected]")
    await writes(ann, "fence")
    await shows(ann, "fence")


async def test_half_an_emoji_does_not_end_the_talk(join):
    ann = await join("Ann")
    await ann.evaluate("document.getElementById('text').value = 'half \\ud83d'")
    await ann.press("#text", "Enter")
    await shows(ann, "half \ufffd")


async def test_ten_pasted_lines_are_one_message(join):
    ann = await join("Ann")
    lines = "\n".join(f"line {number}" for number in range(10))
    await ann.focus("#text")
    await ann.keyboard.insert_text(lines)  # what pasting does
    await ann.press("#text", "Enter")
    await shows(ann, "line 9")
    assert await messages(ann) == [lines]


async def test_a_message_that_is_too_long_says_so_and_is_kept(join):
    ann = await join("Ann")
    await ann.fill("#text", "x" * 1800)
    assert await ann.inner_text("#counter") == ""
    await ann.fill("#text", "🦊" * 1950)
    assert await ann.inner_text("#counter") == "1950 of 2000 characters"
    await ann.fill("#text", "x" * 2001)
    await ann.press("#text", "Enter")
    why = await ann.evaluate("document.getElementById('text').validationMessage")
    assert why == "1 characters too many. Please send it in parts."
    assert len(await ann.input_value("#text")) == 2001
    await writes(ann, "x" * 2000)
    await shows(ann, "x" * 2000)


async def test_what_the_server_refuses_comes_back_into_the_box(join):
    ann = await join("Ann")
    await ann.fill("#text", "x" * 2001)
    submit = "$('composer').dispatchEvent(new Event('submit', { cancelable: true }))"
    await ann.evaluate(f"{submit}; text.value = 'meanwhile'")
    await shows(ann, "A message has 1 to 2000 characters.", "#toast")
    assert await ann.input_value("#text") == "x" * 2001 + "\nmeanwhile"
    assert await ann.locator("#unsent li").count() == 0


async def test_messages_of_one_member_in_a_row_are_a_group(join):
    ann, bob = await join("Ann"), await join("Bob")
    for page, text in ((ann, "one"), (ann, "two"), (bob, "three"), (ann, "four")):
        await writes(page, text)
        await shows(bob, text)
    grouped = await bob.locator("#log .message.more .text").all_inner_texts()
    assert grouped == ["two"]
    assert re.fullmatch(r"\d\d:\d\d", await bob.locator("#log time").last.inner_text())
    await bob.hover("#log .more")
    assert re.search(r"\d{4}", await bob.locator("#log .more").get_attribute("title"))


async def test_who_is_typing_is_shown_for_a_moment(join):
    ann, bob = await join("Ann"), await join("Bob")
    await ann.clock.install()
    await bob.fill("#text", "I was just about to say")
    await shows(ann, "Bob", "#typing")
    assert await bob.inner_text("#typing") == ""  # one knows
    await ann.clock.fast_forward(10_000)
    await ann.locator("#typing span").wait_for(state="detached")  # it ends by itself
    await bob.fill("#text", "And now I do")
    await asyncio.sleep(0.1)
    await bob.press("#text", "Enter")
    await shows(ann, "And now I do")
    assert await ann.inner_text("#typing") == ""
    assert "typing" not in await ann.inner_text("#log")


async def test_enter_while_composing_is_not_a_send(join):
    ann = await join("Ann")
    await ann.fill("#text", "nihao")
    enter = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true})"
    safari = enter.replace("isComposing: true", "keyCode: 229")
    await ann.evaluate(f"document.getElementById('text').dispatchEvent({enter})")
    await ann.evaluate(f"document.getElementById('text').dispatchEvent({safari})")
    await ann.press("#text", "Shift+Enter")
    assert await ann.input_value("#text") == "nihao\n"
    await ann.press("#text", "Enter")
    await shows(ann, "nihao")


async def test_the_keyboard_of_a_phone_stays_open_and_its_enter_is_a_new_line(join):
    phone = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
    page = await join("Ann", **phone)
    await page.tap("#text")
    await page.keyboard.type("two")
    await page.keyboard.press("Enter")
    await page.keyboard.type("lines")
    await page.tap("#send")
    await shows(page, "two lines")
    assert await messages(page) == ["two\nlines"]
    assert await page.evaluate("document.activeElement.id") == "text"  # so it is still open


async def test_the_box_grows_with_what_is_written_and_the_log_stays_at_its_end(tab):
    """Also where the script has to do it, as in Firefox."""
    ann = await tab()
    await ann.add_init_script("CSS.supports = () => false")
    await ann.reload()
    await ann.evaluate("text.style.fieldSizing = 'fixed'")
    await enters(ann, "Ann")
    for number in range(30):
        await writes(ann, f"line {number}")
    await shows(ann, "line 29")
    box = ann.locator("#text")
    small = (await box.bounding_box())["height"]
    for lines in range(1, 9):
        await ann.fill("#text", "line\n" * lines)
        await asyncio.sleep(0.05)  # for the page to have noticed
    assert (await box.bounding_box())["height"] > 4 * small
    await ann.press("#text", "End")
    await ann.keyboard.type("more")
    await asyncio.sleep(0.2)
    assert not await ann.is_visible("#new")
    await expect(ann.locator("#log li:last-child")).to_be_in_viewport()
    await ann.press("#text", "Enter")
    await shows(ann, "more")
    assert (await box.bounding_box())["height"] == small


async def test_under_the_box_stands_how_to_write_code_and_a_new_line(join):
    ann = await join("Ann")
    await shows(ann, "Shift+Enter: a new line. Code goes between ``` and ```.", "#hint")
    assert "hint" in (await ann.get_attribute("#text", "aria-describedby")).split()
    tablet = {"viewport": {"width": 1024, "height": 768}, "has_touch": True, "is_mobile": True}
    bob = await join("Bob", **tablet)
    assert await bob.inner_text("#hint") == "Code goes between ``` and ```."  # Enter is a new line


async def test_a_message_without_an_echo_says_what_it_waits_for(join, line):
    ann, bob = await join("Ann", line), await join("Bob")
    await ann.clock.install()
    line.silent = {"in", "out"}
    await writes(ann, "into the void")
    await ann.clock.fast_forward(5000)
    await shows(ann, "Waiting for the network…", "#status")
    line.cut()
    line.silent = set()
    await shows(bob, "into the void")
    await shows(ann, "Connected again.", "#told")
    await ann.clock.fast_forward(3000)
    await expect(ann.locator("#told")).to_have_text("")
    line.silent = {"out"}  # the server is heard, but it does not hear us
    await writes(ann, "one of many")
    await writes(bob, "still here")
    await shows(ann, "still here")
    await ann.clock.fast_forward(5000)
    await shows(ann, "they are being read more slowly", "#status")
