"""The page, in a real browser: reading, scrolling, and taking home what was said."""

import asyncio
import re

from conftest import enters, hears, peer, scroll_up, settings, shows, transcript, writes
from playwright.async_api import expect


async def test_the_log_stays_where_its_reader_is(server, join):
    ann, bob = await join("Ann"), await peer(server, "Bob")
    for number in range(40):
        bob.send(say=f"line {number}", id=f"x{number}")
    await shows(ann, "line 39")
    end = "#log li:last-child"
    await expect(ann.locator(end)).to_be_in_viewport()  # it follows
    assert not await ann.is_visible("#new")
    await scroll_up(ann)
    await ann.click("text=Newest")  # a way back, though nothing is new
    await expect(ann.locator(end)).to_be_in_viewport()
    await ann.focus("#scroller")
    for _ in range(10):
        await ann.press("#scroller", "ArrowUp")  # also by small steps it can be left
    await expect(ann.locator(end)).not_to_be_in_viewport()
    await scroll_up(ann)
    for number in range(3):
        bob.send(say=f"new {number}", id=f"n{number}")
    await shows(ann, "3 new", "#new")
    await expect(ann.locator(end)).not_to_be_in_viewport()
    assert await ann.title() == "(3) Room PARTY2"
    await ann.click("#new")
    await expect(ann.locator(end)).to_be_in_viewport()
    assert not await ann.is_visible("#new")
    assert await ann.title() == "Room PARTY2"


async def test_who_was_at_the_end_is_there_in_a_window_of_another_shape(join):
    ann = await join("Ann", viewport={"width": 768, "height": 1024})
    for number in range(15):
        await writes(ann, f"line {number} " + "of many words " * 2 * number)
    await shows(ann, "line 14")
    end = ann.locator("#log li:last-child")
    for button in ("#wire-open", "#wire-close"):  # the log becomes wider and lower, and back
        await ann.click(button)
        await asyncio.sleep(0.3)  # for the page to have noticed
        await expect(end).to_be_in_viewport()
        await expect(ann.locator("#new")).not_to_be_visible()
    for height, scrolls in ((300, True), (310, False)):
        await ann.set_viewport_size({"width": 768, "height": height})
        followed = f"innerHeight === {height} && size === sizeOf(scroller)"
        while not await ann.evaluate(followed):
            await asyncio.sleep(0.05)
        if scrolls:
            await scroll_up(ann)
        await expect(end).not_to_be_in_viewport()  # who was not at the end is left alone
    await ann.set_viewport_size({"width": 768, "height": 9000})
    await expect(ann.locator("#new")).not_to_be_visible()


async def test_what_came_while_the_tab_was_hidden_is_counted_and_marked(server, join):
    ann, bob = await join("Ann"), await peer(server, "Bob")
    bob.send(say="seen", id="seen")
    await shows(ann, "seen")
    # There is no way to hide a tab of a headless browser: the page is told so.
    hide = "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
    hide += "document.dispatchEvent(new Event('visibilitychange')) }"
    await ann.evaluate(hide, True)
    for number in range(30):
        bob.send(say=f"unseen {number}", id=f"x{number}")
    await shows(ann, "unseen 29")
    assert await ann.title() == "(30) Room PARTY2"
    await ann.evaluate(hide, False)
    line = ann.locator("#log .unread")
    await expect(line).to_be_in_viewport()  # where reading goes on
    after = await line.evaluate("li => li.nextElementSibling.querySelector('.text').innerText")
    assert after == "unseen 0"
    await writes(ann, "I have read it")
    await shows(ann, "I have read it")
    assert await ann.title() == "Room PARTY2"


@settings(
    CHAT_HISTORY="1000000000",  # or a slow page had a gap
    CHAT_HISTORY_BYTES="1000000000",
    CHAT_OUTBOX_BYTES="1000000000",
    CHAT_RATE="10000",
    CHAT_BURST="10000",
    CHAT_SHARE="100",
)
async def test_five_thousand_messages_leave_the_page_quick(server, join):
    ann = await join("Ann")
    bob = await peer(server, "Bob")
    reading = asyncio.create_task(hears(bob, "message 4999<"))
    for number in range(5_000):
        bob.send(say=f"message {number}", id=f"m{number}")
        if number % 100 == 0:
            await asyncio.sleep(0.02)
    await reading
    await shows(ann, "message 4999")
    assert await ann.locator("#log li").count() <= 501
    await writes(ann, "still here")  # within the 8 seconds that a page has for each step
    await shows(ann, "still here")
    async with ann.expect_download() as download:
        await ann.click("#presence .save")
    saved = await transcript(download)
    numbers = [int(number) for number in re.findall(r"Bob: message (\d+)\n", saved)]
    assert (len(numbers), numbers == list(range(5_000))) == (5_000, True)
    assert "Ann: still here" in saved


async def test_what_was_read_can_be_taken_home_when_it_is_over(join):
    ann = await join("Ann")
    await writes(ann, "first\nsecond <b>line</b>")
    await shows(ann, "second")
    await ann.fill("#text", "half a sentence")
    await ann.click("#leave")
    await ann.click("#ask button >> text=Leave")
    assert await ann.input_value("#rest") == "half a sentence"  # to be copied
    assert await ann.evaluate("document.activeElement.innerText") == "Save transcript"
    async with ann.expect_download() as download:
        await ann.click("#over .save")
    when = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\]"
    pattern = rf"{when} \* Ann joined\n{when} Ann: first\n    second <b>line</b>\n"
    pattern += r"\[not sent\] half a sentence\n"
    assert re.fullmatch(pattern, await transcript(download))
    assert re.fullmatch(r"Room PARTY2, [\d-]+\.txt", (await download.value).suggested_filename)
    await ann.click("text=Start anew")
    await ann.wait_for_selector("text=Create a room")


async def test_thirty_who_join_are_one_line(server, join):
    ann = await join("Ann", viewport={"width": 360, "height": 640})
    await writes(ann, "Welcome!")
    await shows(ann, "Welcome!")
    peers = [await peer(server, f"Bob {number}") for number in range(28)]
    await shows(ann, "Bob 0, Bob 1 and 26 others joined")
    for gone in peers[:3]:
        gone.send(leave=True)
    await shows(ann, "others joined, Bob 0, Bob 1 and Bob 2 left")
    await expect(ann.locator(".message")).to_be_in_viewport(ratio=1)
    async with ann.expect_download() as download:
        await ann.evaluate("save()")
    assert (await transcript(download)).count(" joined\n") == 29  # there all of them are


async def test_no_message_is_taller_than_the_screen_until_it_is_opened(join):
    ann = await join("Ann")
    await writes(ann, "\n".join(["line"] * 100))
    message = ann.locator("#log .message")
    assert (await message.bounding_box())["height"] < 500
    await ann.click("text=Show all")
    assert (await message.bounding_box())["height"] > 2_000
    await writes(ann, "Z" + "\u0301" * 200)
    await ann.wait_for_selector("#log .message >> nth=1")
    clipped = "getComputedStyle(document.querySelector('#log .message:last-child')).overflow"
    assert await ann.evaluate(clipped) == "clip"  # the marks pile up over the neighbours otherwise
    await writes(ann, "```\n" + "code\n" * 200 + "```")
    code = ann.locator("#log pre")
    assert (await code.bounding_box())["height"] < 500
    await code.focus()
    await ann.keyboard.press("End")
    await expect(code).not_to_have_js_property("scrollTop", 0)


async def test_a_link_ends_where_it_was_meant_to_and_code_begins_below_its_word(join):
    ann = await join("Ann")
    address = "https://a.example/Foo_(bar)"
    await writes(ann, f"(see {address}), or\n```python\nprint('in Python')\n```")
    link = ann.locator("#log a")
    assert await link.get_attribute("href") == await link.inner_text() == address
    assert await ann.inner_text("#log pre") == "print('in Python')"


async def test_what_comes_while_another_window_is_in_front_is_not_read(server, join):
    ann, bob = await join("Ann"), await peer(server, "Bob")
    await ann.wait_for_selector("#live[aria-live=polite]")
    await ann.context.grant_permissions(["notifications"])
    await ann.evaluate(
        """() => { window.noted = [];
            window.Notification = class { constructor(...said) { noted.push(said); } };
            Notification.requestPermission = async () => "granted";
        }"""
    )
    await ann.click("text=Notify me")
    await ann.evaluate("document.hasFocus = () => false")
    bob.send(say="are you there?", id="x1")
    await shows(ann, "are you there?")
    assert await ann.title() == "(1) Room PARTY2"
    assert "unread.svg" in await ann.get_attribute("#icon", "href")
    [[title, options]] = await ann.evaluate("noted")
    assert (title, options["body"]) == ("Bob in Room PARTY2", "are you there?")
    await ann.evaluate("document.hasFocus = () => true; dispatchEvent(new Event('focus'))")
    assert await ann.title() == "Room PARTY2"
    assert "unread.svg" not in await ann.get_attribute("#icon", "href")


async def test_each_day_has_a_line(tab):
    ann = await tab()
    await ann.clock.set_fixed_time("2099-01-01")  # so that all of it was on another day
    await enters(ann, "Ann")
    await writes(ann, "yesterday")
    await shows(ann, "yesterday")
    assert await ann.locator("#log .day").count() == 1
