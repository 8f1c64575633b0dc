"""Answers in the page: thinking, formulas, code, and the mixture at work."""

import re

from chat_page import EXPERTS, LAYERS, RICH, DenseEngine, experts_of, say

CARET = "(box) => getComputedStyle(document.querySelector(box + ' > :last-child'), '::after').content !== 'none'"


def test_formulas_code_and_thinking(visit):
    chat = visit({"go": RICH}, per_step=4)
    page = chat.page
    chat.engine.steps_left = 3
    chat.ask("go", wait=False)
    thought = page.locator("details.thought")
    page.get_by_text("Thinking…").wait_for()
    assert thought.get_attribute("open") is not None
    chat.until("document.querySelector('.thought > .markdown').textContent")
    assert page.evaluate(CARET, ".thought > .markdown")
    chat.engine.steps_left = None
    chat.settle()
    assert re.fullmatch(r"Thought for \d+ s", thought.locator("summary").inner_text())
    assert thought.get_attribute("open") is None
    thought.locator("summary").click()
    assert thought.locator(".markdown").inner_text() == "first the formula"
    assert not page.evaluate(CARET, ".thought > .markdown")
    answer = chat.last("> .markdown")
    assert answer.locator("math").count() == 2 and answer.locator('math[display="block"] mfrac').count() == 1
    assert answer.locator("mfrac").bounding_box()["height"] > 20  # laid out, not written in a row
    assert answer.locator("td.right").count() == 1
    assert answer.locator("pre .k").first.inner_text() == "def"
    chat.button("Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == 'def double(x):  # twice\n    return 2 * "x"'
    chat.ask("and then?")
    assert "The square" in chat.prompt() and "first the formula" not in chat.prompt()


def test_a_formula_appears_only_once_it_is_closed(visit):
    chat = visit({"go": "Look: $x^2 + y$ and more"}, per_step=1)
    answer = chat.page.locator(".message.answer > .markdown")
    before = len(chat.engine.tokenizer.encode("Look: $x^2 + y"))
    chat.engine.steps_left = before
    chat.ask("go", wait=False)
    answer.get_by_text("Look: $x^2 + y").wait_for()
    assert answer.locator("math, .unreadable").count() == 0
    assert chat.page.evaluate(CARET, ".answer > .markdown")
    chat.engine.steps_left = 1
    answer.locator("math").wait_for()
    assert "$" not in answer.inner_text()
    chat.engine.steps_left = None
    chat.settle()
    assert answer.locator("math").count() == 1 and answer.inner_text().endswith("and more")
    assert not chat.page.evaluate(CARET, ".answer > .markdown")


HEBREW = "שלום\n\n- אחת\n- שתיים\n\n> ציטוט\n\n```python\nx = 1\n```"
STYLE = "([selector, name]) => getComputedStyle(document.querySelector('.answer > .markdown ' + selector))[name]"


def test_an_answer_from_right_to_left(visit):
    chat = visit({"go": HEBREW})
    chat.ask("go")
    for selector, name, value in (
        ("ul", "paddingRight", "24px"),
        ("ul", "paddingLeft", "0px"),
        ("blockquote", "borderRightWidth", "3px"),
        ("blockquote", "borderLeftWidth", "0px"),
        ("pre", "direction", "ltr"),
    ):
        assert chat.page.evaluate(STYLE, [selector, name]) == value, (selector, name)


FIRST_ROW = """() => {
    const canvas = document.querySelector('.map canvas'), context = canvas.getContext('2d');
    const column = (canvas.width - 26) / 8;
    const at = (expert) => context.getImageData(26 + (expert + 0.5) * column, canvas.height / 4, 1, 1).data;
    return [...Array(8).keys()].map((expert) => [...at(expert)].slice(0, 3));
}"""


def test_the_mixture_at_work(visit):
    chat = visit({"go": "The sea is wide."}, per_step=3)
    page = chat.page
    chat.ask("go")
    tokenizer = chat.engine.tokenizer
    ids = [*tokenizer.encode("The sea is wide."), tokenizer.eos_id]
    figures = page.locator(".fingerprint").inner_text()
    assert f"{len(ids)} tokens" in figures and "$" in figures
    page.locator(".fingerprint").click()
    tokens = page.locator(".strip span")
    assert [token.text_content() for token in tokens.all()] == [tokenizer.token_bytes(id).decode() for id in ids]
    last_of_step = {place for place in range(len(ids)) if place % 3 == 2 or place == len(ids) - 1}
    guessed = [place for place, token in enumerate(tokens.all()) if "guessed" in token.get_attribute("class")]
    assert guessed == sorted(set(range(len(ids))) - last_of_step)
    assert f"{100 * len(guessed) / len(ids):.0f} % guessed ahead" in figures

    def told(index):
        layers = [sorted(set(experts_of(ids[index], layer))) for layer in range(LAYERS)]
        return [f"layer {layer + 1}: {', '.join(map(str, experts))}" for layer, experts in enumerate(layers)]

    readout = page.locator(".readout")
    for index in (0, 3, len(ids) - 2):
        tokens.nth(index).hover()
        for words in told(index):
            assert words in readout.inner_text()
    tokens.nth(len(ids) - 1).hover()
    assert "the last token" in readout.inner_text()
    page.locator(".strip").focus()  # the same by keyboard
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert all(words in readout.inner_text() for words in told(1))
    assert page.locator(".strip [aria-selected=true]").get_attribute("id") == "token-1"

    # An expert of the map, and the tokens that went to it.
    counts = [[sum(e in experts_of(id, layer) for id in ids[:-1]) for e in range(EXPERTS)] for layer in range(LAYERS)]
    canvas = page.locator(".map canvas").bounding_box()
    column = (canvas["width"] - 26) / EXPERTS
    page.mouse.move(canvas["x"] + 26 + 2.5 * column, canvas["y"] + canvas["height"] * 0.75)
    assert f"Layer 2, expert 2: {counts[1][2]} tokens" in readout.inner_text()
    assert page.locator(".strip .went").count() == counts[1][2]
    page.mouse.move(5, 5)
    brightness = [sum(colour) for colour in page.evaluate(FIRST_ROW)]  # the page is light: the more, the darker
    for expert in range(EXPERTS):
        for other in range(EXPERTS):
            assert (brightness[expert] < brightness[other]) == (counts[0][expert] > counts[0][other])

    page.get_by_text("As a table").click()
    busiest = max(range(EXPERTS), key=lambda e: (counts[0][e], -e))
    first = page.locator("#panel tbody tr").first.locator("td").first
    assert first.inner_text() == f"{busiest} ({100 * counts[0][busiest] / (len(ids) - 1):.0f} %)"
    assert f"{LAYERS} layers by {EXPERTS} experts" in page.locator(".map canvas").get_attribute("aria-label")
    page.reload()
    page.locator(".fingerprint").click()
    assert tokens.count() == len(ids)  # kept with the conversation


def test_a_model_without_experts_has_tokens_and_a_bill(visit, scripted):
    chat = visit(server=scripted(say({"go": "The sea is wide."}), engine=DenseEngine, per_step=3))
    page = chat.page
    chat.ask("go")
    for _ in range(2):  # as it was written, and as it was kept
        page.locator(".fingerprint").click()
        assert page.locator(".strip span").count() > 10
        page.locator(".strip").focus()
        page.keyboard.press("Home")
        assert "expert" not in page.locator("#token-0").get_attribute("aria-label")
        assert page.locator(".bill").is_visible() and not page.locator(".map canvas").is_visible()
        page.reload()


def test_the_end_is_followed_until_a_person_scrolls_up(visit):
    chat = visit({"go": "wave\n\n" * 60})
    chat.ask("go")
    gap = (
        "(box => Math.round(box.scrollHeight - box.scrollTop - box.clientHeight))(document.getElementById('scroller'))"
    )
    assert chat.page.evaluate(gap) <= 1
    # The event of the page's own scrolling comes after the text has grown again.
    chat.page.evaluate("""() => {
        const more = document.createElement('p');
        more.style.height = '900px';
        document.querySelector('#thread').append(more);
        document.getElementById('scroller').dispatchEvent(new Event('scroll'));
    }""")
    chat.until(f"{gap} <= 1")
    assert chat.page.locator("#to-end").is_hidden()
    chat.page.locator("#scroller").hover()
    chat.page.mouse.wheel(0, -500)
    chat.page.locator("#to-end").wait_for()
    chat.page.evaluate("document.querySelector('#thread p:last-child').style.height = '1800px'")
    chat.page.wait_for_timeout(100)
    assert chat.page.evaluate(gap) > 1000
    chat.page.locator("#to-end").click()
    chat.until(f"{gap} <= 1")


READ_OUT = """() => {
    window.readOut = [];
    const readout = document.querySelector('.readout');
    new MutationObserver(() => window.readOut.push(readout.textContent)).observe(readout, {childList: true});
}"""


def test_the_map_grows_with_the_answer(visit):
    chat = visit()
    page = chat.page
    chat.ask("short")
    page.keyboard.press("Control+Period")
    chat.engine.steps_left = 5
    chat.ask("b" * 150, wait=False)
    chat.until("document.querySelectorAll('.strip span').length === 40")
    page.get_by_text("and counting").wait_for()
    page.evaluate(READ_OUT)
    chat.engine.steps_left = None
    chat.settle()
    page.get_by_text("for a million such answers").wait_for()
    [told] = page.evaluate("window.readOut")  # at the end, not at every step
    assert told.startswith("Busiest: ")
    page.locator(".strip").focus()
    page.keyboard.press("Home")
    assert "layer 1:" in page.locator("#token-0").get_attribute("aria-label")
