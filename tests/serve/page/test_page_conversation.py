"""Conversations in the page: written, stopped, branched, found again, carried elsewhere."""

import json

import pytest
from chat_page import RICH, RICH_ANSWER


def exported_from(chat, path):
    with chat.page.expect_download() as download:
        chat.button("Export all").click()
    file = path / download.value.suggested_filename
    download.value.save_as(file)
    return file


def test_a_conversation_from_the_first_word_to_the_export(visit, tmp_path):
    chat = visit({"hello": "Hi **there**!", "more": RICH})
    page = chat.page
    assert page.title() == "Baleen"
    chat.ask("hello")
    assert page.locator(".message.user .bubble").inner_text() == "hello"
    assert chat.last(".markdown strong").inner_text() == "there"
    chat.ask("more")
    assert page.title() == "hello – Baleen"
    chat.button("Copy answer").last.click()
    assert page.evaluate("navigator.clipboard.readText()") == RICH_ANSWER

    chat.button("New conversation").click()
    chat.ask("another day")
    assert chat.titles() == ["another day", "hello"]
    page.keyboard.press("Control+k")
    page.keyboard.type("square")
    assert chat.titles() == ["hello"]
    assert page.locator("#conversations mark").inner_text().lower() == "square"
    page.fill("#search", "")

    chat.button("More for “hello”").click()
    chat.button("Rename").click()
    page.keyboard.type("Greetings")
    page.keyboard.press("Enter")
    page.locator("#conversations .name", has_text="Greetings").wait_for()

    exported = json.loads(exported_from(chat, tmp_path).read_text(encoding="utf-8"))
    assert exported["format"] == "baleen-conversations" and len(exported["conversations"]) == 2
    [greetings] = [c for c in exported["conversations"] if c["title"] == "Greetings"]
    nodes = sorted(greetings["nodes"].values(), key=lambda node: node["created"])
    assert [node["content"] for node in nodes] == ["hello", "Hi **there**!", "more", RICH_ANSWER]
    assert [node["state"] for node in nodes if node["role"] == "assistant"] == ["done", "done"]
    assert len(greetings["traces"]) == 2


def test_the_list_leaves_be_what_is_at_work_in_it(visit):
    chat = visit()
    page = chat.page
    chat.ask("one")
    chat.engine.steps_left = 0
    chat.ask("two", wait=False)
    chat.button("More for “one”").click()
    chat.button("Rename").click()
    page.keyboard.type("Half a ti")
    chat.engine.steps_left = None
    chat.settle()
    page.wait_for_timeout(100)  # the list is told last
    page.keyboard.type("tle")
    page.keyboard.press("Enter")
    assert chat.titles() == ["Half a title"] and page.title() == "Half a title – Baleen"
    assert page.evaluate("document.activeElement.textContent") == "Half a title"

    chat.engine.steps_left = 0
    chat.ask("three", wait=False)
    chat.button("More for “Half a title”").click()
    chat.button("Rename").focus()
    page.evaluate("document.activeElement.isOld = true")
    chat.engine.steps_left = None
    chat.settle()
    chat.until("!document.activeElement.isOld && document.activeElement.textContent === 'Rename'")


def test_deleted_and_brought_back(visit):
    chat = visit()
    chat.ask("one")
    chat.button("More for “one”").click()
    chat.button("Delete").click()
    chat.page.get_by_text("No conversations yet.").wait_for()
    chat.button("Undo").click()
    chat.last(".markdown").get_by_text("I heard one").wait_for()
    chat.page.reload()
    chat.last(".markdown").get_by_text("I heard one").wait_for()
    assert chat.titles() == ["one"]
    assert chat.page.locator(".fingerprint").is_visible()  # its trace is back too


def test_an_export_opens_in_another_browser(visit, tmp_path):
    chat = visit({"more": RICH})
    chat.ask("hello")
    chat.ask("more")
    file = exported_from(chat, tmp_path)
    elsewhere = visit(server=chat.server)
    page = elsewhere.page
    page.set_input_files("#import-file", file)
    elsewhere.told("1 of 1 conversations added.")
    elsewhere.button("hello").click()
    page.locator(".fingerprint").nth(1).click()
    assert page.locator(".strip span").count() > 20
    page.set_input_files("#import-file", file)
    elsewhere.told("0 of 1 conversations added; the others are here already.")
    elsewhere.ask("and on")  # what was imported can be continued
    page.set_input_files("#import-file", file)  # and an older version of it goes beside it, not over it
    elsewhere.told("1 of 1 conversations added.")
    assert elsewhere.titles() == ["hello", "hello"]
    elsewhere.button("More for “hello”").nth(1).click()
    elsewhere.button("Delete").click()  # its traces are its own
    elsewhere.told("Conversation deleted")
    page.reload()
    elsewhere.button("hello").click()
    page.locator(".fingerprint").nth(2).wait_for()


DAMAGED = {
    "not JSON": lambda export: json.dumps(export)[:-9],
    "another file": lambda export: "[]",
    "a later version": lambda export: json.dumps({**export, "version": 2}),
    "no parent": lambda export: json.dumps(export).replace('"parent": null', '"parent": "' + 24 * "a" + '"'),
    "a bad id": lambda export: json.dumps(export).replace('"parent": null', '"parent": "__proto__"'),
    "a number for text": lambda export: json.dumps(export).replace('"content": "hello"', '"content": 7'),
    "a circle": lambda export: circled(export),
}


def circled(export):
    nodes = list(export["conversations"][0]["nodes"].values())
    nodes[0]["parent"] = nodes[-1]["id"]
    return json.dumps(export)


def test_a_damaged_export_changes_nothing(visit, tmp_path):
    chat = visit()
    chat.ask("hello")
    export = exported_from(chat, tmp_path).read_text(encoding="utf-8")
    for name, damage in DAMAGED.items():
        broken = tmp_path / "broken.json"
        broken.write_text(damage(json.loads(export)), encoding="utf-8")
        chat.page.set_input_files("#import-file", broken)
        chat.told("Nothing was imported")
        assert chat.titles() == ["hello"], name


KEPT_RUNNING = """async () => {
    const done = (request) => new Promise((resolve) => (request.onsuccess = () => resolve(request.result)));
    const store = await done(indexedDB.open('baleen', 1));
    const kept = await done(store.transaction('conversations').objectStore('conversations').getAll());
    store.close();
    const nodes = kept.flatMap((conversation) => Object.values(conversation.nodes));
    return nodes.some((node) => node.state === 'running' && node.content.length > 20);
}"""


def test_stop_and_reload_in_the_midst_of_an_answer(visit):
    chat = visit({"long": "word " * 100})
    page = chat.page
    chat.engine.steps_left = 5
    chat.ask("long", wait=False)
    chat.until("document.querySelector('.answer > .markdown').textContent.length > 20")
    assert chat.last().get_attribute("aria-busy") == "true"
    page.keyboard.press("Escape")
    chat.last().get_by_text("Stopped.").wait_for()
    chat.settle()
    kept = page.locator(".answer > .markdown").inner_text()
    assert 20 < len(kept) <= 5 * 8
    page.reload()
    chat.ready()
    chat.last().get_by_text("Stopped.").wait_for()
    chat.until("kept => document.querySelector('.answer > .markdown')?.innerText === kept", kept)
    assert chat.engine.aborted == [0] and chat.engine.pages.in_use == 0

    chat.engine.steps_left = 5
    chat.button("Regenerate answer").click()  # and leave while it is on its way
    chat.until("document.querySelector('.running > .markdown')?.textContent.length > 20")
    chat.until(KEPT_RUNNING)  # it is saved once a second
    page.reload()
    chat.last().get_by_text("Stopped.").wait_for()
    page.get_by_label("Version 2 of 2").wait_for()
    chat.until("document.querySelector('.answer > .markdown').innerText.length > 20")
    assert chat.engine.aborted == [0, 1] and chat.engine.pages.in_use == 0


def test_edit_and_regenerate_branch_and_lose_nothing(visit):
    chat = visit({"red": "A rose.", "blue": "The sea.", "green": "A leaf."})
    page = chat.page
    chat.ask("red")
    chat.ask("blue")
    page.press("#prompt", "ArrowUp")
    assert page.evaluate("document.activeElement.value") == "blue"
    page.keyboard.press("Control+a")
    page.keyboard.type("green")
    page.keyboard.press("Enter")
    chat.last(".markdown").get_by_text("A leaf.").wait_for()
    chat.settle()
    assert page.locator(".bubble").all_inner_texts() == ["red", "green"]
    assert "green" in chat.prompt() and "A rose." in chat.prompt() and "blue" not in chat.prompt()

    chat.button("Previous version").click()
    chat.last(".markdown").get_by_text("The sea.").wait_for()
    assert page.locator(".bubble").all_inner_texts() == ["red", "blue"]
    chat.button("Regenerate answer").last.click()
    chat.last().get_by_label("Version 2 of 2").wait_for()
    chat.settle()
    chat.button("Edit message").first.click()
    page.keyboard.press("Escape")  # an edit given up changes nothing
    page.reload()
    chat.last(".markdown").get_by_text("The sea.").wait_for()
    assert page.get_by_label("Version 1 of 2").count() == 1 and page.get_by_label("Version 2 of 2").count() == 1


def test_what_cannot_be_sent_stays_in_its_box(visit):
    chat = visit()
    page = chat.page
    chat.ask("red")
    chat.button("Edit message").click()
    box = page.locator(".editing textarea")
    box.fill("green")
    chat.engine.steps_left = 0
    chat.ask("blue", wait=False)
    chat.button("Send").click()  # of the edit: the other button says Stop
    chat.told("Stop the answer first.")
    page.fill("#prompt", "and")
    page.press("#prompt", "Enter")
    chat.told("Stop the answer first.")
    assert (box.input_value(), page.input_value("#prompt")) == ("green", "and")
    chat.engine.steps_left = None
    chat.settle()
    box.press("Enter")
    chat.last(".markdown").get_by_text("I heard green").wait_for()
    chat.settle()
    assert len(chat.engine.requests) == 3

    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    chat.last(".markdown").get_by_text("I heard green").wait_for()
    page.fill("#prompt", "one more")
    page.press("#prompt", "Enter")
    chat.told("No model is there to answer")
    assert page.input_value("#prompt") == "one more"
    chat.button("Edit message").click()
    box.fill("yellow")
    box.press("Enter")
    chat.told("No model is there to answer")
    assert box.input_value() == "yellow"
    box.press("Escape")
    chat.button("Regenerate answer").click()
    chat.told("No model is there to answer")
    assert page.locator(".message").count() == 2


def test_two_tabs_of_one_conversation(visit):
    chat = visit()
    chat.ask("one")
    tab = chat.beside()
    tab.ready()
    tab.last("> .markdown").get_by_text("I heard one").wait_for()
    tab.page.evaluate("document.querySelector('.bubble').isTheSame = true")
    chat.engine.steps_left = 0
    chat.ask("two", wait=False)
    tab.page.locator(".running").wait_for()  # it is seen there, too
    tab.ask("three", wait=False)
    chat.engine.steps_left = None
    chat.settle()
    tab.settle()
    whole = "document.querySelectorAll('.answer:not(.running) .fingerprint:not([hidden])').length === 3"
    for side in (chat, tab):
        side.until(whole)
        assert side.page.locator(".bubble").all_inner_texts() == ["one", "two", "three"]
    assert tab.page.evaluate("document.querySelector('.bubble').isTheSame")  # nothing was built anew
    chat.page.reload()
    chat.ready()
    chat.until(whole)
    texts = "[...document.querySelectorAll('.answer > .markdown')].map((answer) => answer.innerText).join()"
    chat.until(f"{texts} === 'I heard one,I heard two,I heard three'")

    chat.button("Regenerate answer").first.click()  # a branch
    chat.settle()
    tab.page.get_by_label("Version 1 of 2").wait_for()  # where one reads, one stays
    assert tab.page.locator(".bubble").count() == 3


def test_settings_reach_the_model_and_stay_with_the_conversation(visit):
    chat = visit()
    page = chat.page
    page.keyboard.press("Control+Comma")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Top p").fill("7")  # beyond what is possible: marked, and not sent
    page.get_by_label("Longest answer").fill("3")
    assert page.get_by_label("Top p").get_attribute("aria-invalid") == "true"
    chat.ask("hello")
    params = chat.engine.requests[0].params
    assert (params.temperature, params.max_tokens) == (0.25, 3) and params.top_p <= 1
    assert "Be brief." in chat.prompt()
    chat.last().get_by_text("Cut off").wait_for()
    page.reload()
    chat.ready()
    page.keyboard.press("Control+Comma")
    assert page.get_by_label("System prompt").input_value() == "Be brief."
    assert page.get_by_label("Temperature").input_value() == "0.25"
    chat.button("Back to the model’s own").click()
    chat.ask("again")
    assert chat.engine.requests[1].params.temperature != 0.25


def test_what_goes_wrong_is_said(visit):
    chat = visit(api_key="secret")
    page = chat.page
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.get_by_text("That key was refused.").wait_for()
    page.fill("#key", "“secret”")  # quotes that were pasted along can't be sent
    page.keyboard.press("Enter")
    assert page.locator("#key:invalid").count() == 1
    page.keyboard.press("Escape")
    chat.told("The server asks for a key, and none was given.")
    page.reload()
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    chat.ready()
    chat.engine.context = 512
    for _ in range(4):  # at last the oldest turns are left out, and it is said so
        chat.ask("many words " * 12)
    assert "no longer seen" in chat.last(".note").first.inner_text()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.ask("hello")
    assert "can’t be reached" in chat.last(".note.error").inner_text()
    page.unroute("**/v1/chat/completions")
    chat.button("Regenerate answer").last.click()
    chat.last(".markdown").get_by_text("I heard hello").wait_for()
    assert chat.last(".note.error").count() == 0


def test_one_key_for_all_that_ask_for_it(visit):
    chat = visit({"go": RICH}, api_key="secret", per_step=32)
    chat.page.fill("#key", "secret")
    chat.page.keyboard.press("Enter")
    chat.ready()
    for _ in range(3):
        chat.ask("go")
    tab = chat.beside()  # where three answers and the list of models are refused at once
    tab.page.fill("#key", "wrong")
    tab.page.keyboard.press("Enter")
    tab.page.get_by_text("That key was refused.").wait_for()
    tab.page.fill("#key", "secret")
    tab.page.keyboard.press("Enter")
    tab.ready()
    tab.until("document.querySelectorAll('.answer > .markdown math').length === 6")
    assert tab.page.locator("#key-dialog").is_hidden()


BLOCKED = """for (const name of ['sessionStorage', 'localStorage', 'indexedDB']) {
    Object.defineProperty(window, name, {get() { throw new DOMException('blocked', 'SecurityError'); }});
}"""


def test_where_the_browser_keeps_nothing(visit):
    chat = visit(api_key="secret")
    page = chat.page
    page.add_init_script(BLOCKED)
    page.reload()
    chat.told("This browser stores nothing here")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    chat.ready()
    for text in ("one", "two"):  # the key is asked for once
        chat.ask(text)
        assert chat.last("> .markdown").inner_text() == f"I heard {text}"
    page.keyboard.press("Control+Comma")
    page.get_by_text("Dark", exact=True).click()
    assert page.locator("html").get_attribute("data-theme") == "dark"


PUT = """async (records) => {
    const opened = indexedDB.open('baleen', 1);
    await new Promise((resolve) => (opened.onsuccess = resolve));
    const transaction = opened.result.transaction('conversations', 'readwrite');
    for (const record of records) transaction.objectStore('conversations').put(record, record.id);
    await new Promise((resolve) => (transaction.oncomplete = resolve));
    opened.result.close();
}"""
BROKEN = """{
    const { get } = IDBObjectStore.prototype;
    IDBObjectStore.prototype.get = function (id) {
        if (this.name === 'traces' || id === 'unreadable') throw new DOMException('it is unreadable', 'UnknownError');
        return get.call(this, id);
    };
    IDBObjectStore.prototype.delete = () => {
        throw new DOMException('it is locked', 'UnknownError');
    };
}"""


def test_a_store_that_is_broken_in_part(visit):
    chat = visit()
    page = chat.page
    chat.ask("one")
    chat.button("New conversation").click()
    chat.ask("two")
    page.evaluate(PUT, [{"id": "malformed", "title": "three"}, {"id": "unreadable"}])
    page.add_init_script(BROKEN)
    page.reload()
    chat.ready()
    assert chat.titles() == ["two", "one"]
    chat.button("one").click()
    chat.last(".markdown").get_by_text("I heard one").wait_for()
    assert page.locator(".fingerprint[hidden]").count() == 1
    chat.ask("and on")
    chat.button("More for “two”").click()
    chat.button("Delete").click()
    chat.told("could not delete the conversation: it is locked")
    assert chat.titles() == ["one", "two"]


@pytest.mark.filterwarnings("ignore")
def test_an_engine_that_fails_in_the_midst(visit):
    chat = visit()
    chat.engine.steps_left = 5
    chat.ask("a" * 200, wait=False)
    chat.until("document.querySelector('.answer > .markdown').textContent.length > 20")
    chat.engine.fail = True
    chat.settle()
    assert "engine failed" in chat.last(".note.error").inner_text()
    assert len(chat.last("> .markdown").inner_text()) > 20  # what came is kept
