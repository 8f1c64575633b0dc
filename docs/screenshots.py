"""The pictures of the chat page in docs/, taken of this build: `make screenshots` (needs Debian's chromium).

python docs/screenshots.py TALKER [MAPPED]: models as `baleen serve` takes them. TALKER is talked to in the light and on
the phone; the experts are those of MAPPED (TALKER without one). Nothing is staged: what they answer is what is shown.
"""

import base64
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
QUALITY = 0.82
CHAT = [
    "What is a whale? Answer in two sentences.",
    "Which bones do baleen whales have instead of teeth? Give a short list in Markdown.",
    "Write a Python function that adds two numbers, with a docstring.",
]
SMALL_TALK = ["Hi, how are you?", "What did you do today?", "What do you like to do on the weekend?"]
TO_WEBP = """async ([png, quality]) => {
    const image = new Image();
    image.src = `data:image/png;base64,${png}`;
    await image.decode();
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [image.width, image.height];
    canvas.getContext('2d').drawImage(image, 0, 0);
    return canvas.toDataURL('image/webp', quality).split(',')[1];
}"""


class Photographer:
    def __init__(self, browser, url: str):
        self._browser, self._url = browser, url

    def visit(self, *, width: int, height: int, dark: bool = False, phone: bool = False, scale: float = 1):
        scheme = "dark" if dark else "light"
        page = self._browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme, is_mobile=phone, device_scale_factor=scale
        )
        page.goto(self._url)
        page.wait_for_selector("#model option", state="attached")
        return page

    def save(self, page, name: str) -> None:
        png = base64.b64encode(page.screenshot()).decode()
        blank = self._browser.new_page()
        (HERE / name).write_bytes(base64.b64decode(blank.evaluate(TO_WEBP, [png, QUALITY])))
        blank.close()
        print(f"docs/{name}: {(HERE / name).stat().st_size // 1024} KiB", file=sys.stderr)


def ask(page, text: str) -> None:
    before = page.locator(".message.answer").count()
    page.fill("#prompt", text)
    page.click("#send")
    page.locator(".message.answer:not(.running)").nth(before).wait_for(timeout=300_000)
    page.wait_for_timeout(500)  # its last layout


def talk(page, model: str, lines: list[str]) -> None:
    page.select_option("#model", model)
    for line in lines:
        ask(page, line)


def open_longest(page) -> None:
    """The mixture at work of the answer with the most tokens, and in it the experts of a token in the middle."""
    answers = page.locator(".fingerprint")
    lengths = [int(text) for text in re.findall(r"(\d+) tokens", " ".join(answers.all_inner_texts()))]
    answers.nth(lengths.index(max(lengths))).click()
    tokens = page.locator(".strip span")
    tokens.nth(tokens.count() // 2).hover()


def take(photographer: Photographer, talker: str, mapped: str) -> None:
    page = photographer.visit(width=1280, height=800)
    talk(page, talker, CHAT if mapped != talker else SMALL_TALK)
    photographer.save(page, "chat.webp")

    page = photographer.visit(width=1440, height=900, dark=True)
    talk(page, mapped, SMALL_TALK)
    open_longest(page)
    photographer.save(page, "chat-mixture.webp")

    page = photographer.visit(width=390, height=760, phone=True, scale=1.5)
    talk(page, talker, CHAT[:2] if mapped != talker else SMALL_TALK[:2])
    photographer.save(page, "chat-phone.webp")


def main(runs: list[str]) -> None:
    command = [sys.executable, "-m", "baleen", "serve", *dict.fromkeys(runs), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        lines = iter(server.stderr.readline, "")
        found = next((match for line in lines if (match := re.match(r"(.+) at (http://\S+)", line))), None)
        if found is None:
            sys.exit("baleen serve did not start: run it by hand to see why")
        names = found[1].split(", ")
        with sync_playwright() as playwright:
            arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
            take(Photographer(browser, found[2]), names[0], names[-1])
            browser.close()
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main(sys.argv[1:] or sys.exit(__doc__))
