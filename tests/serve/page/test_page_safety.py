"""What a model writes can do nothing in the page: not past the server's cleaning, and not if that had failed."""

import json

HOSTILE = """<script>window.pwned = 1</script><img src=x onerror="window.pwned = 2">
<svg onload="window.pwned = 3"><style>body { display: none }</style></svg>
<iframe srcdoc="<script>parent.pwned = 4</script>"></iframe><b style="position:fixed;inset:0">over all</b>
[one](javascript:window.pwned=5) [two](JaVaScRiPt&colon;window.pwned=6) <a href="javascript:window.pwned=7">three</a>
![leak](https://leak.invalid/picked.png) $\\href{javascript:window.pwned=8}{four}$ [five](/v1/models)

```html"><script>window.pwned = 9</script>
<script>window.pwned = 10</script>
```

<math><maction actiontype="toggle" onclick="window.pwned=11"><mtext>six</mtext></maction></math>
[real](https://example.invalid/)"""

# What the policy must hold back if the server's cleaning failed.
UNCLEAN = """<p>before</p><img src="x" onerror="window.pwned=1"><script>window.pwned=2</script>
<svg><script>window.pwned=3</script><a id="svglink" href="javascript:window.pwned=4"><text>x</text></a></svg>
<p style="position:fixed;inset:0" id="cover">cover</p><a id="link" href="javascript:window.pwned=5">link</a>
<details open ontoggle="window.pwned=6">d</details><style>#prompt { display: none }</style>
<iframe srcdoc="<script>parent.pwned=7</script>"></iframe>
<video autoplay onerror="window.pwned=8"><source src=x></video>
<form action="/leak"><button id="submit">go</button></form>
<input autofocus onfocus="window.pwned=9">"""


def test_a_hostile_answer_runs_nothing(visit, tmp_path):
    chat = visit({"attack": HOSTILE, "think": f"<think>{HOSTILE}</think>{HOSTILE}"}, per_step=32)
    page = chat.page
    chat.ask("attack")
    chat.button("New conversation").click()
    chat.ask("think")
    page.locator("details.thought summary").click()
    page.locator(".fingerprint").click()
    assert page.locator(".strip span").count() > 500
    thread = page.locator("#thread")
    for selector in ("script", "iframe", "style", "img", "b[style]", "[onclick]", "[onerror]", "maction", "form"):
        assert thread.locator(selector).count() == 0, selector
    hrefs = [link.get_attribute("href") for link in thread.locator("a").all()]
    assert set(hrefs) == {"https://leak.invalid/picked.png", "https://example.invalid/", None}
    for link in thread.locator("a").all():
        assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert thread.get_by_text("window.pwned").count() > 5  # it is there, as text
    assert page.evaluate("window.pwned") is None
    assert page.locator("#prompt").is_visible()

    with page.expect_download() as download:
        chat.button("Export all").click()
    exported = json.loads(download.value.path().read_text(encoding="utf-8"))
    for conversation in exported["conversations"]:
        conversation["updated"] += 1000
        conversation["title"] = HOSTILE
        for node in conversation["nodes"].values():
            node |= {"model": HOSTILE, "error": HOSTILE, "state": "failed"}
    file = tmp_path / "hostile.json"
    file.write_text(json.dumps(exported))
    page.set_input_files("#import-file", file)
    page.get_by_text("2 of 2 conversations added").wait_for()
    page.locator("#conversations .title", has_text="pwned").first.click()
    page.locator(".note.error").first.wait_for()
    assert page.locator("#sidebar img, #sidebar script, .note img, .note script").count() == 0
    assert page.evaluate("window.pwned") is None


def test_one_s_own_hostile_words_are_only_words(visit):
    chat = visit(per_step=32)
    chat.page.keyboard.press("Control+Comma")
    chat.page.get_by_label("System prompt").fill(HOSTILE[:60])
    chat.ask(HOSTILE[:120])
    assert chat.page.locator(".bubble").text_content() == HOSTILE[:120]
    assert chat.titles()[0].startswith("<script>")
    assert chat.page.evaluate("window.pwned") is None


SINKS = {
    "HTML from a string": "document.body.innerHTML = '<p>'",
    "a second policy": "trustedTypes.createPolicy('other', {})",
}


def test_the_policy_holds_even_if_the_cleaning_failed(visit):
    chat = visit()
    page = chat.page
    page.route("**/render", lambda route: route.fulfill(json={"html": UNCLEAN}))
    chat.ask("go")
    page.locator("#link").wait_for(state="attached")
    for id in ("link", "svglink", "submit"):
        page.evaluate(f"document.getElementById('{id}').dispatchEvent(new MouseEvent('click', {{bubbles: true}}))")
    page.wait_for_timeout(300)
    assert page.evaluate("window.pwned") is None
    assert "leak" not in page.url
    assert page.evaluate("getComputedStyle(document.getElementById('cover')).position") == "static"
    assert page.locator("#prompt").is_visible()
    for name, sink in SINKS.items():
        outcome = page.evaluate(f"() => {{ try {{ {sink}; return 'done'; }} catch (error) {{ return error.name; }} }}")
        assert outcome != "done", name
