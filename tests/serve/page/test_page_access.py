"""The page on a phone, in the dark, by keyboard alone, and as a screen reader hears it."""

import re

import pytest
from chat_page import LAPTOP, PHONE, RICH, RICH_ANSWER

FITS = "document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth"


def test_phone(visit):
    chat = visit({"go": RICH}, viewport=PHONE, phone=True)
    page = chat.page
    page.fill("#prompt", "go")
    page.press("#prompt", "Enter")
    assert page.input_value("#prompt") == "go\n"
    chat.button("Send").tap()
    chat.settle()
    assert page.evaluate(FITS)
    assert not page.locator("#conversations .name").is_visible()
    chat.button("Conversations").tap()
    page.locator("#conversations .name").wait_for()
    assert page.evaluate("document.querySelector('main').inert") and page.evaluate(FITS)
    page.locator("#backdrop").tap(position={"x": 370, "y": 400})
    page.locator(".fingerprint").tap()
    panel = page.locator("#panel").bounding_box()
    assert (panel["width"], panel["height"]) == (PHONE["width"], PHONE["height"]) and page.evaluate(FITS)
    page.locator(".strip span").nth(2).tap()
    assert "layer 1:" in page.locator(".readout").inner_text()
    page.locator("#close-panel").tap()
    boxes = [(b.get_attribute("aria-label"), b.bounding_box()) for b in page.locator("main button:visible").all()]
    assert len(boxes) > 5
    assert [name for name, box in boxes if min(box["width"], box["height"]) < 24] == []  # WCAG 2.2, target size


def test_a_screen_that_is_turned_leaves_nothing_out_of_reach(visit):
    chat = visit(viewport=PHONE)
    page = chat.page
    inert = "document.querySelector('main').inert"
    chat.button("Conversations").click()
    assert page.evaluate(inert)
    page.set_viewport_size(LAPTOP)
    chat.until(f"!{inert}")
    assert page.locator("#backdrop").is_hidden()
    chat.ask("hello")
    page.keyboard.press("Control+Comma")
    assert not page.evaluate(inert)
    page.set_viewport_size(PHONE)
    chat.until(inert)
    page.set_viewport_size(LAPTOP)
    chat.until(f"!{inert}")
    page.set_viewport_size(PHONE)
    page.locator("#close-panel").click()
    assert not page.evaluate(inert)


# Text whose contrast with what lies behind it is under WCAG's 4.5.
CONTRAST = """() => {
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const ground = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const colour = rgb(getComputedStyle(at).backgroundColor);
            if (colour[3] !== 0) return colour;
        }
    };
    const hidden = (element) => !element.checkVisibility({opacityProperty: true, visibilityProperty: true})
        || element.closest('.unseen, :disabled, .skip, noscript, [inert]');
    const texts = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) if (walker.currentNode.data.trim()) texts.push(walker.currentNode);
    const seen = texts.filter((text) => !hidden(text.parentElement));
    const ratios = seen.map((text) => {
        const [a, b] = [light(rgb(getComputedStyle(text.parentElement).color)), light(ground(text.parentElement))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        return [text.data.trim().slice(0, 30), text.parentElement.className, ratio];
    });
    return {count: seen.length, poor: ratios.filter(([, , ratio]) => ratio < 4.5)};
}"""
MORE = """

```python
@d
class A(B):  # c
    x: int = 1
    def f(self): raise E(f"a{b!r}\\n")
```

`code` $\\bad$ [link](https://a.b)

> quote"""


def is_dark(page) -> bool:
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", ground))) < 150


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_has_contrast_in_either_theme(visit, dark):
    chat = visit({"go": RICH + MORE}, dark=dark, per_step=16)
    page = chat.page
    assert is_dark(page) == dark
    chat.ask("go")
    page.locator("details.thought summary").click()
    page.locator(".fingerprint").click()
    page.get_by_text("As a table").click()
    page.locator(".strip span").nth(3).hover()
    told = page.evaluate(CONTRAST)
    assert told["poor"] == [] and told["count"] > 150
    page.keyboard.press("Control+Comma")
    told = page.evaluate(CONTRAST)
    assert told["poor"] == [] and told["count"] > 60
    page.get_by_text("Light" if dark else "Dark", exact=True).click()  # the person's choice goes first
    assert is_dark(page) != dark
    page.reload()
    assert is_dark(page) != dark


NAMELESS = """() => [...document.querySelectorAll(
        'button, input, select, textarea, a[href], summary, dialog, nav, aside, [role=listbox], [role=img]')]
    .filter((e) => !(e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim()
        || document.getElementById(e.getAttribute('aria-labelledby'))?.textContent))
    .map((e) => e.outerHTML.slice(0, 80))"""
LISTEN = """() => {
    window.told = [];
    const announcer = document.getElementById('announcer');
    new MutationObserver(() => told.push(announcer.textContent)).observe(announcer, {childList: true, subtree: true});
}"""
FOCUSED = """() => {
    const e = document.activeElement;
    const visible = getComputedStyle(e).outlineStyle !== 'none' || e.id === 'prompt'; // its frame shows it
    return [e.id || e.getAttribute('aria-label') || e.className || e.tagName, visible];
}"""


def test_a_screen_reader_is_told_once_and_whole(visit):
    chat = visit({"go": RICH}, per_step=2)
    page = chat.page
    page.evaluate(LISTEN)
    chat.ask("go")
    assert page.evaluate("window.told") == ["Answering", RICH_ANSWER]
    assert page.locator("#thread[aria-live], #thread [aria-live], #thread [role=log]").count() == 0
    assert page.locator("#thread h2").all_inner_texts() == ["You", "Answer of script"]
    for shortcut in ("Control+Period", "Control+Comma", "Control+Slash"):
        page.keyboard.press(shortcut)
        assert page.evaluate(NAMELESS) == []
    assert page.locator("#shortcuts dt").count() == 8


PRESS = """(keys) => document.activeElement.dispatchEvent(
    new KeyboardEvent('keydown', {...keys, bubbles: true, cancelable: true}))"""


def test_all_by_keyboard(visit):
    chat = visit({"go": RICH}, per_step=16)
    page = chat.page
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    page.keyboard.press("Enter")
    chat.settle()
    assert page.locator(".bubble").inner_text() == "first line\nsecond"
    chat.ask("go")
    page.keyboard.press("Control+Period")
    assert page.evaluate("document.activeElement.id") == "panel-title"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Control+Shift+O")
    page.locator(".message").first.wait_for(state="detached")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Control+k")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.locator(".message.answer").nth(1).wait_for()
    assert page.evaluate(PRESS, {"key": "ю", "code": "Period", "ctrlKey": True}) is False  # a Russian layout
    assert page.evaluate("document.activeElement.id") == "panel-title"
    page.keyboard.press("Escape")
    assert page.evaluate(PRESS, {"key": "-", "code": "Slash", "ctrlKey": True})  # a German one: less zoom, not help

    address = page.url
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert page.evaluate("location.href") == address
    page.locator(".skip").focus()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        name, visible = page.evaluate(FOCUSED)
        assert visible or name == "BODY", f"focus can't be seen on {name}"  # BODY: round the corner
        reached.add(name)
    assert {
        "new",
        "search",
        "model",
        "open-settings",
        "prompt",
        "Regenerate answer",
        "fingerprint",
        "copy-code",
    } <= reached


def test_escape_closes_what_is_open_before_it_stops(visit):
    chat = visit()
    page = chat.page
    chat.engine.steps_left = 0
    chat.ask("one", wait=False)
    page.keyboard.press("Control+Comma")
    page.keyboard.press("Control+k")
    page.keyboard.type("nothing")
    page.get_by_text("Nothing found.").wait_for()
    page.keyboard.press("Escape")  # empties the search
    assert chat.titles() == ["one"]
    page.keyboard.press("Escape")  # leaves it
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert page.locator("#panel").is_visible()
    page.keyboard.press("Escape")  # closes the panel
    assert page.locator("#panel").is_hidden()
    assert chat.last().get_attribute("aria-busy") == "true"
    page.keyboard.press("Escape")
    chat.last().get_by_text("Stopped.").wait_for()


HURRY = """() => {
    const later = window.setTimeout;
    window.setTimeout = (run, wait) => later(run, wait / 40);
    const toasts = document.getElementById('toasts');
    new MutationObserver(() => toasts.querySelector('button')?.focus()).observe(toasts, {childList: true});
}"""


def test_a_notice_waits_for_who_is_at_it(visit):
    chat = visit()
    page = chat.page
    chat.engine.steps_left = 0
    chat.ask("one", wait=False)
    page.fill("#prompt", "two")
    for _ in range(3):
        page.press("#prompt", "Enter")
    assert page.locator("#toasts[role=status] .toast").all_inner_texts() == ["Stop the answer first."]
    chat.told("Stop the answer first.")
    chat.engine.steps_left = None
    chat.settle()
    page.evaluate(HURRY)  # eight seconds are 0.2; and focus goes to what can be done about a notice
    chat.button("More for “one”").click()
    chat.button("Delete").click()
    chat.button("Undo").wait_for()
    page.wait_for_timeout(400)
    assert page.evaluate("document.activeElement.textContent") == "Undo"
    page.evaluate("document.activeElement.blur()")
    page.locator(".toast").wait_for(state="detached")


COMPOSED = """([selector, key]) => document.querySelector(selector).dispatchEvent(
    new KeyboardEvent('keydown', {key, keyCode: 229, bubbles: true, cancelable: true}))"""


def test_keys_of_an_input_method_are_not_the_page_s(visit):
    chat = visit()
    page = chat.page
    chat.ask("one")
    chat.engine.steps_left = 0
    chat.ask("two", wait=False)
    page.fill("#prompt", "three")
    for key in ("Enter", "Escape"):
        assert page.evaluate(COMPOSED, ["#prompt", key])
    assert page.input_value("#prompt") == "three" and chat.last().get_attribute("aria-busy") == "true"
    chat.engine.steps_left = None
    chat.settle()
    assert chat.engine.aborted == []

    chat.button("Edit message").last.click()
    page.locator(".editing textarea").fill("four")
    for key in ("Enter", "Escape"):
        assert page.evaluate(COMPOSED, [".editing textarea", key])
    assert page.input_value(".editing textarea") == "four" and page.locator(".message").count() == 4

    chat.button("More for “one”").click()
    chat.button("Rename").click()
    page.keyboard.type("five")
    for key in ("Enter", "Escape"):
        assert page.evaluate(COMPOSED, ["#conversations input", key])
    assert page.input_value("#conversations input") == "five"
    page.keyboard.press("Enter")
    page.locator("#conversations .name", has_text="five").wait_for()
