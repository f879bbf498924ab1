"""The page, in a real browser: the list of members, and keeping a room in order."""

from conftest import messages, peer, shows, writes

SAID_OF_HIDDEN = "getComputedStyle($('people').querySelector('.unseen .who'), '::after').content"
NOTE_FRAMES = "window.sent = []; socket.send = (frame) => sent.push(JSON.parse(frame)); 0"


async def test_you_are_first_and_the_others_by_name(server, join):
    for name in ("Dee", "Ann", "Cy"):
        await peer(server, name)
    bob = await join("Bob", viewport={"width": 360, "height": 740})
    await bob.click("#presence summary")
    await shows(bob, "(you)", "#people")  # the list has come, and has been arranged
    names = await bob.locator("#people .who").all_inner_texts()
    assert names == ["Bob", "Ann", "Cy", "Dee"]
    await shows(bob, "(host)", "#people li:last-child")
    colours = {await li.get_attribute("class") for li in await bob.locator("#people li").all()}
    assert len(colours) == 4


async def test_what_is_said_of_a_member_is_one_line_of_words(join, line):
    _, bob = await join("Ann", line), await join("Bob")
    line.cut(up=False)
    await shows(bob, "Ann (reconnecting)", "#people")
    said = await bob.inner_text("#people .away")  # boxes side by side would be lines here
    assert said.startswith("Ann (reconnecting) (host)")


async def test_the_focus_stays_in_the_list_when_somebody_joins(server, join):
    ann = await join("Ann")
    await peer(server, "Bob")
    await shows(ann, "Bob", "#people")
    await ann.focus("#people button")
    await peer(server, "Cy")
    await shows(ann, "Cy", "#people")
    await ann.wait_for_selector("#people button[aria-label^='Bob']:focus")
    await ann.keyboard.press("Enter")
    await shows(ann, "Bob", "#question")
    await peer(server, "Dee")
    await shows(ann, "Dee", "#people")
    await ann.keyboard.press("Escape")
    await ann.wait_for_selector("#presence summary:focus")  # the button has gone


async def test_only_the_host_can_lock_and_remove(join):
    ann, bob = await join("Ann"), await join("Bob")
    await bob.click("#people button")
    await shows(bob, "Ann", "#question")
    assert await bob.locator("#ask button").all_inner_texts() == [
        "Hide their messages, for me",
        "Cancel",
    ]
    assert not await bob.is_visible("#lock")
    await ann.evaluate(NOTE_FRAMES)
    await ann.click("#people button")
    await ann.click("text=Remove from the room")
    await ann.dblclick("#lock")  # which is one click
    removed = await ann.get_attribute("#people li:last-child", "data-member")
    assert await ann.evaluate("sent") == [{"remove": removed}, {"lock": True}]


async def test_anybody_can_hide_somebody_for_oneself(join):
    ann, bob = await join("Ann"), await join("Bob")
    await writes(bob, "before")
    await shows(ann, "before")
    await ann.click("#people button")
    await ann.click("text=Hide their messages")
    assert await ann.evaluate(SAID_OF_HIDDEN) == '" (hidden)"'
    await writes(bob, "after")
    await shows(bob, "after")
    await writes(ann, "fence")
    await shows(ann, "fence")
    assert await ann.locator("#log .text:visible").all_inner_texts() == ["fence"]
    await shows(bob, "fence")
    assert await messages(bob) == ["before", "after", "fence"]  # nobody else notices
    await ann.click("#people button")
    await ann.click("text=Show their messages")
    assert await ann.locator("#people .unseen").count() == 0
    await shows(ann, "after")
    assert await messages(ann) == ["before", "after", "fence"]


async def test_who_is_removed_reads_why_and_who_is_locked_out_too(tab, join):
    ann, bob, cy = await join("Ann"), await join("Bob"), await tab()
    await ann.click("#people button")
    await ann.click("text=Remove from the room")
    await shows(bob, "The host has removed you", "#over")
    await shows(ann, "Bob was removed")
    await ann.click("#lock")
    await shows(ann, "Ann locked the room")
    await shows(ann, ", locked", "summary")
    await cy.fill("#name", "Cy")
    await cy.press("#name", "Enter")
    await shows(cy, "This room is locked", "#unusable")
    await ann.reload()  # who was here comes in all the same
    await ann.wait_for_selector("[data-state=connected]")
    await ann.click("#lock")
    await shows(ann, "Ann unlocked the room")
    await cy.click("text=Enter the room")
    await cy.wait_for_selector("[data-state=connected]")
    await bob.click("text=Enter again")
    await bob.fill("#name", "Bob")  # the token is worth nothing any more, nor the key
    await bob.press("#name", "Enter")
    await shows(bob, "The host has removed you", "#unusable")
