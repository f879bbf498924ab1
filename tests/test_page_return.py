"""The page, in a real browser: lost connections, reloads, restarts, and leaving."""

import asyncio

from conftest import (
    agree,
    enters,
    health,
    messages,
    settings,
    shows,
    stop_the_clock,
    transcript,
    until,
    writes,
)

from bench.peer import Proxy


async def test_messages_written_while_the_line_is_down_arrive_once_and_in_order(join, line):
    ann, bob = await join("Ann", line), await join("Bob")
    await writes(ann, "one")
    await shows(bob, "one")
    line.cut(up=False)
    await ann.wait_for_selector("[data-state=reconnecting]")
    for text in ("two", "three", "four"):
        await writes(ann, text)
    assert await ann.locator("#unsent li").count() == 3  # visible, and visibly not sent
    await writes(bob, "meanwhile")
    await shows(bob, "Ann (reconnecting)", "#people")
    line.cut(up=True)
    await ann.evaluate("dispatchEvent(new Event('online'))")
    await shows(bob, "four")
    await shows(ann, "four")
    assert await messages(bob) == ["one", "meanwhile", "two", "three", "four"]
    assert await messages(ann) == await messages(bob)
    assert await ann.locator("#unsent li").count() == 0
    assert "left" not in await bob.inner_text("#log")


async def test_it_connects_at_once_when_the_browser_is_online_again(join, line):
    ann = await join("Ann", line)
    await stop_the_clock(ann)  # the next try is not due
    line.cut(up=False)
    await ann.wait_for_selector("[data-state=reconnecting]")
    line.cut(up=True)
    await ann.evaluate("dispatchEvent(new Event('online'))")
    await ann.wait_for_selector("[data-state=connected]")


async def test_what_was_not_confirmed_before_a_reload_is_sent_after_it(join, line):
    ann = await join("Ann", line)
    line.silent = {"out"}
    await writes(ann, "into the void")
    line.silent = set()
    await ann.reload()
    await shows(ann, "into the void")
    assert await ann.locator("#unsent li").count() == 0


@settings(CHAT_SECRET="kept through a restart")
async def test_a_message_whose_echo_was_lost_in_a_restart_is_shown_once(server, join):
    async with Proxy(server) as line, Proxy(server) as other:
        ann, bob = await join("Ann", line), await join("Bob", other)
        line.silent = {"in"}
        await writes(ann, "said once")
        await shows(bob, "said once")  # and Ann does not know it
        server.stop()
        line.silent = set()
        server.start(CHAT_SECRET="kept through a restart")
        await shows(ann, "said once")
        await writes(bob, "fence")
        await shows(ann, "fence")
        await shows(bob, "fence")
        assert await messages(ann) == await messages(bob) == ["said once", "fence"]


async def test_a_connection_that_breaks_again_and_again_loses_nothing(join, line):
    ann, bob = await join("Ann", line), await join("Bob", line)
    for number in range(20):
        await writes(ann, f"message {number}")
        if number % 4 == 0:
            line.cut()
    await shows(bob, "message 19")
    await shows(ann, "message 19")
    assert await messages(ann) == await messages(bob) == [f"message {n}" for n in range(20)]


async def test_a_server_that_has_gone_silent_is_noticed(tab, line):
    ann = await tab(at=line)
    await stop_the_clock(ann)
    await ann.reload()  # so that all its timers go by that clock
    await enters(ann, "Ann")
    line.silent = {"in", "out"}
    await ann.clock.fast_forward(25_000)
    assert await ann.get_attribute("#chat", "data-state") == "connected"
    await ann.clock.fast_forward(10_000)  # a beat and a half, and the next look at the clock
    await ann.wait_for_selector("[data-state=reconnecting]")
    line.silent = set()
    line.cut()
    await ann.clock.resume()
    await ann.wait_for_selector("[data-state=connected]")


async def test_a_reload_keeps_the_room_the_talk_and_what_was_typed(join):
    ann = await join("Ann")
    await writes(ann, "before")
    await shows(ann, "before")
    await ann.fill("#text", "half a sentence")
    await ann.reload()
    await ann.wait_for_selector("[data-state=connected]")
    await shows(ann, "before")
    assert await ann.input_value("#text") == "half a sentence"
    assert await ann.locator("#log .mine").count() == 1
    assert await ann.evaluate("document.activeElement.id") == "text"  # writing goes on
    assert "left" not in await ann.inner_text("#log")


async def test_what_was_given_back_when_leaving_is_not_sent_later(join, line):
    ann, bob = await join("Ann", line), await join("Bob")
    line.cut(up=False)
    await writes(ann, "never to be said")
    await ann.click("#leave")
    assert await ann.input_value("#rest") == "never to be said"
    async with ann.expect_download() as download:
        await ann.click("#over .save")
    assert "[not sent] never to be said\n" in await transcript(download)
    line.cut(up=True)
    await ann.click("text=Enter again")
    await enters(ann, "Ann")
    assert await ann.input_value("#text") == "never to be said"  # in the box, to be sent or not
    await agree(ann, bob)


async def test_the_back_button_leads_back_into_the_talk(server, join):
    ann = await join("Ann")
    await writes(ann, "before")
    await shows(ann, "before")
    await ann.goto(f"http://127.0.0.1:{server.port}/")
    await ann.go_back()
    await ann.wait_for_selector("[data-state=connected]")
    await shows(ann, "before")
    await writes(ann, "and after")
    await shows(ann, "and after")


@settings(program="import chat; chat.GRACE_CLOSED = 1; chat.main()")
async def test_closing_the_tab_is_a_leaving_after_a_moment(join):
    ann, bob = await join("Ann"), await join("Bob")
    await bob.close()
    await shows(ann, "Bob (reconnecting)", "#people")
    await shows(ann, "Bob left")


async def test_a_second_tab_of_the_same_member_takes_over(join):
    ann = await join("Ann")
    again = await ann.context.new_page()
    stored = await ann.evaluate("JSON.stringify(sessionStorage)")  # "Duplicate tab" copies it
    await again.add_init_script(f"Object.assign(sessionStorage, {stored})")
    await again.goto(ann.url)
    await again.wait_for_selector("[data-state=connected]")
    await shows(ann, "another tab", "#over")
    await ann.click("text=Enter again")
    await ann.wait_for_selector("[data-state=connected]")
    await shows(again, "another tab", "#over")


async def test_leaving_while_the_line_is_down_is_a_leaving(join, line):
    ann, bob = await join("Ann", line), await join("Bob")
    await ann.clock.install()
    line.cut(up=False)
    await ann.wait_for_selector("[data-state=reconnecting]")
    await ann.click("#leave")
    await shows(ann, "You have left this room", "#over")
    line.cut(up=True)
    await ann.clock.fast_forward(30_000)  # to the try that was on its way
    assert await ann.get_attribute("#chat", "data-state") == "closed"
    assert "Ann 2" not in await bob.inner_text("#people")
    await ann.reload()
    await ann.wait_for_selector("#name")  # a stranger again


async def test_whoever_leaves_before_the_welcome_does_not_come_back(join, line):
    ann, bob = await join("Ann", line), await join("Bob")
    await ann.evaluate("redial(), (socket.onmessage = null)")  # as if the welcome were on its way
    while await ann.evaluate("socket.readyState") != 1:
        await asyncio.sleep(0.05)
    await ann.click("#leave")
    await shows(bob, "Ann left")
    await writes(bob, "fence")
    await shows(bob, "fence")
    joined = "[...log.children].filter((li) => li.said === 'Ann joined').length"
    assert await bob.evaluate(joined) == 1  # and not again
    assert await ann.get_attribute("#chat", "data-state") == "closed"


async def test_a_welcome_that_gets_lost_makes_no_second_member(server, tab, line):
    ann = await tab("/r/PARTY2", line)
    await ann.fill("#name", "x" * 30)
    await ann.press("#name", "Enter")
    await shows(ann, "at most 24", "#unusable")
    line.silent.add("in")
    await ann.fill("#name", "Ann")
    await ann.press("#name", "Enter")
    await until(lambda: health(server)["members"] == 1)
    line.silent.clear()
    line.cut()
    await ann.wait_for_selector("[data-state=connected]")
    assert await ann.locator("#people .who").all_inner_texts() == ["Ann"]


async def test_a_page_without_htmx_says_so(tab):
    ann = await tab("/")
    await ann.route("**/htmx*", lambda route: route.abort())
    await ann.goto(ann.url + "r/PARTY2")
    await shows(ann, "not been loaded completely", "#over")


async def test_an_unknown_close_code_is_no_end(join):
    ann = await join("Ann")
    await ann.evaluate("letGo(); closed({ code: 4999, reason: 'of a later version' })")
    await ann.wait_for_selector("[data-state=reconnecting]")
    await ann.wait_for_selector("[data-state=connected]")


async def test_being_offline_is_believed_at_once_and_a_button_tries_now(join, line):
    ann = await join("Ann", line)
    line.up = False
    await stop_the_clock(ann)  # the next try is not due
    await ann.context.set_offline(True)
    await shows(ann, "You are offline. Reconnecting…", "#status")
    await ann.context.set_offline(False)
    while await ann.evaluate("socket.readyState") != 3:  # the try at being online again has failed
        await asyncio.sleep(0.05)
    line.up = True
    await ann.click("text=Try now")
    await ann.wait_for_selector("[data-state=connected]")


async def test_who_gave_an_unusable_name_and_waits_can_still_enter(tab):
    ann = await tab()
    await ann.fill("#name", "x" * 30)
    await ann.press("#name", "Enter")
    await shows(ann, "at most 24", "#unusable")
    await ann.evaluate("socket.onclose({ code: 1013, reason: 'not in time' }); socket.close()")
    assert await ann.get_attribute("#chat", "data-state") == "outside"
    await enters(ann, "Ann")


async def test_who_enters_while_the_line_of_an_unusable_name_closes_stays_in(tab):
    ann = await tab()
    await ann.fill("#name", "x" * 30)
    await ann.press("#name", "Enter")
    await shows(ann, "at most 24", "#unusable")
    await ann.fill("#name", "Ann")
    await ann.evaluate("socket.close(); $('join').requestSubmit()")
    await ann.wait_for_selector("[data-state=connected]")
    await asyncio.sleep(1)  # in which the next try would have been made
    assert await ann.get_attribute("#chat", "data-state") == "connected"


async def test_nothing_is_stuck_when_a_connection_is_replaced_while_it_opens(join, line):
    ann = await join("Ann", line)
    for number in range(5):
        await ann.evaluate("dispatchEvent(new Event('online'))")
        await asyncio.sleep(0.1 * number)
        await ann.evaluate("dispatchEvent(new Event('online'))")
        await writes(ann, f"message {number}")
    await shows(ann, "message 4")
    assert await messages(ann) == [f"message {number}" for number in range(5)]
    assert await ann.locator("#unsent li").count() == 0


@settings()
async def test_a_closed_room_says_so_and_keeps_what_was_read(server, join, line):
    ann = await join("Ann", line)
    await writes(ann, "to be read")
    await shows(ann, "to be read")
    server.stop()
    await writes(ann, "to be said")
    await ann.click("#open-invite")
    server.start()  # without the secret of the first one, the room cannot be opened again
    await shows(ann, "does not know you any more", "#over")
    assert await ann.input_value("#rest") == "to be said"
    assert not await ann.is_visible("#invite")
    assert not await ann.is_visible("#status")
    assert not await ann.is_visible("#presence")
    assert await messages(ann) == ["to be read"]


@settings(CHAT_SECRET="kept through a restart")
async def test_after_a_restart_the_talk_goes_on(server, join, line):
    ann, bob = await join("Ann", line), await join("Bob", line)
    await writes(ann, "before")
    await shows(bob, "before")
    server.stop()
    await ann.wait_for_selector("[data-state=reconnecting]")
    await writes(ann, "while it is down")
    server.start(CHAT_SECRET="kept through a restart")
    await shows(bob, "while it is down")
    await shows(ann, "while it is down")
    for page in (ann, bob):
        assert await messages(page) == ["before", "while it is down"]
        assert await page.locator("#log .gap").all_inner_texts() == [
            "The server has restarted. Messages from just before that may be missing."
        ]
        async with page.expect_download() as download:
            await page.click("#presence .save")
        assert "\n* The server has restarted. Messages" in await transcript(download)
        assert page.errors == []
    assert await bob.locator("#people .who").all_inner_texts() == ["Bob", "Ann"]
