"""The page, in a real browser: inviting others by link and QR code."""

import json

import zxingcpp
from conftest import enters, shows, writes
from playwright.async_api import expect


async def test_the_link_is_copied(join):
    ann = await join("Ann")
    await ann.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await ann.click("header .copy")
    await shows(ann, "The link is copied.", "#told")
    assert await ann.evaluate("navigator.clipboard.readText()") == ann.url


async def test_the_link_is_copied_without_https_too(tab):
    """In a class room the server is at http://192.168.…, and pages there have no clipboard."""
    ann = await tab(host="class.test")
    await enters(ann, "Ann")
    assert not await ann.evaluate("isSecureContext")
    await ann.click("header .copy")
    await shows(ann, "The link is copied.", "#copied")
    await ann.click("#close-invite")
    await ann.focus("#text")
    await ann.keyboard.press("Control+V")
    assert await ann.input_value("#text") == ann.url
    # And if even that is forbidden, the link can be copied by hand.
    await ann.evaluate("document.execCommand = () => false")
    await ann.click("header .copy")
    await shows(ann, "Copy the link that is marked", "#copied")
    assert await ann.evaluate("getSelection().toString()") == ann.url


async def test_the_qr_code_is_the_link_and_large_enough_for_a_class(join):
    ann = await join("Ann")
    await ann.click("#open-invite")
    image = ann.locator("#invite .qr")
    await expect(image).to_be_in_viewport(ratio=1)
    assert (await image.bounding_box())["height"] > 0.65 * ann.viewport_size["height"]
    await shows(ann, ann.url, "#invite")
    await shows(ann, "Only this computer can open that link.", "#invite")  # and how to change it
    drawing = await image.evaluate("box => new XMLSerializer().serializeToString(box.firstChild)")
    blank = await ann.context.new_page()  # whose policy lets a script read a picture
    pixels = await blank.evaluate(
        """async (drawing) => {
            const image = new Image(300, 300);
            image.src = "data:image/svg+xml," + encodeURIComponent(drawing);
            await image.decode();
            const canvas = new OffscreenCanvas(300, 300).getContext("2d");
            canvas.drawImage(image, 0, 0, 300, 300);
            return [...canvas.getImageData(0, 0, 300, 300).data].filter((_, i) => i % 4 === 0);
        }""",
        drawing,
    )
    seen = zxingcpp.read_barcodes(memoryview(bytes(pixels)).cast("B", (300, 300)))
    assert [code.text for code in seen] == [ann.url]
    await ann.click("#close-invite")
    await writes(ann, "back in the talk")
    await shows(ann, "back in the talk")


async def test_the_share_sheet_is_offered_where_there_is_one(tab):
    ann = await tab()
    await ann.add_init_script(
        "navigator.share = async (what) => { document.title = JSON.stringify(what) }"
    )
    await ann.reload()
    await enters(ann, "Ann")
    await ann.click("#open-invite")
    await ann.click("#share")
    assert json.loads(await ann.title()) == {"title": "Room PARTY2", "url": ann.url}


async def test_a_wrong_code_comes_back_to_be_corrected(tab):
    ann = await tab("/")
    await ann.fill("#code", "party-3")
    await ann.keyboard.press("Enter")  # Join is the first button
    await shows(ann, "There is no such room", "h1")
    assert await ann.input_value("#code:focus") == "PARTY3"
    await ann.fill("#code", "PARTY0")
    await ann.keyboard.press("Enter")
    await shows(ann, "That is not a code", "h1")
    assert await ann.input_value("#code:focus") == "PARTY0"
    await ann.press("#code", "End")
    await ann.keyboard.press("Backspace")
    await ann.keyboard.type("2")
    await ann.keyboard.press("Enter")
    await enters(ann, "Ann")


async def test_a_link_sent_before_the_lesson_opens_its_room(tab):
    ann = await tab("/r/KWR4TN")
    bob = await tab("/r/KWR4TN")
    await ann.click("text=Open KWR4TN")
    await enters(ann, "Ann")
    await bob.click("text=Open KWR4TN")  # it is open by now
    await enters(bob, "Bob")
    await shows(ann, "Bob joined")


async def test_only_the_last_one_is_asked_before_leaving(join):
    ann = await join("Ann")
    await shows(ann, "Nobody else is here yet", "#empty")
    bob = await join("Bob")
    await shows(ann, "Bob joined")
    assert not await ann.is_visible("#empty")
    await bob.click("#leave")
    await shows(bob, "You have left this room", "#over")
    await shows(ann, "Bob left")
    await ann.click("#leave")
    await shows(ann, "You are the last one here", "#ask")
    await ann.click("text=Cancel")
    await writes(ann, "still here")
    await shows(ann, "still here")
    await ann.click("#leave")
    await ann.click("#ask button >> text=Leave")
    await shows(ann, "You have left this room", "#over")
    await ann.click("text=Enter again")
    await shows(ann, "There is no such room", "h1")
