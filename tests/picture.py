"""Make the two pictures of the README: the chat beside the wire view, in light and in dark.

python tests/picture.py
"""

import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.async_api import async_playwright

HERE = Path(__file__).parent.parent
TALK = (
    ("Ann", "Hi Bob! Open the wire view, and you see what you say."),
    ("Bob", "As bytes?"),
    ("Ann", 'As a frame: `{"say": "As bytes?", "id": "…"}`'),
    ("Cleo", "And the server sends it to all of us, as HTML: https://htmx.org"),
    ("Bob", "Pull the plug: whatever you miss comes with the next welcome."),
)


async def picture(browser, address: str, scheme: str) -> None:
    look = {"viewport": {"width": 1440, "height": 810}, "device_scale_factor": 2}
    pages = {}
    for name in ("Ann", "Bob", "Cleo"):
        context = await browser.new_context(**look, color_scheme=scheme, locale="en-GB")
        page = pages[name] = await context.new_page()
        await page.goto(address)
        if name == "Ann":  # who creates the room
            await page.evaluate(f"fetch('{address}', {{method: 'POST'}})")
            await page.goto(address)
        await page.fill("#name", name)
        await page.press("#name", "Enter")
        await page.wait_for_selector("[data-state=connected]")
        if name == "Ann":
            await page.click("#wire-open")
            await page.wait_for_selector("#wire-state:has-text('open')")
    for number, (name, text) in enumerate(TALK, 1):
        await pages[name].fill("#text", text)
        await pages[name].press("#text", "Enter")
        for page in pages.values():
            await page.wait_for_selector(f"#log .message:nth-child({number} of .message)")
    await pages["Ann"].mouse.move(0, 0)
    await pages["Ann"].focus("#text")
    await pages["Ann"].screenshot(path=HERE / "static" / f"screenshot-{scheme}.png")
    for page in pages.values():
        await page.click("#leave")
        await page.context.close()


async def pictures(address: str) -> None:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for scheme in ("light", "dark"):
            await picture(browser, address, scheme)
        await browser.close()


def main() -> None:
    command = [sys.executable, HERE / "chat.py", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://\S+", server.stdout.readline())[0]
        asyncio.run(pictures(f"{address}/r/KWR4TN"))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
