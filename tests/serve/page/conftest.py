"""A real browser: Debian's chromium, driven by playwright. Skipped without one, unless BALEEN_BROWSER=require."""

import os
import shutil

import pytest
from chat_page import LAPTOP, PATIENCE, ChatPage, TracedEngine, say

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")  # while it lives, playwright's event loop runs in this thread
def chromium():
    if CHROMIUM is None:
        missing = "no chromium on this machine (apt-get install chromium)"
        assert os.environ.get("BALEEN_BROWSER") != "require", missing
        pytest.skip(f"{missing}: the chat page is not tested")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, scripted):
    """Opens the page of a server that answers by script, in a browser profile of its own.

    At the end: no error in the page, and not one request went anywhere but to the server.
    """
    contexts, faults, strangers = [], [], []

    def open_page(answers=None, *, server=None, viewport=LAPTOP, dark=False, phone=False, per_step=8, api_key=None):
        if server is None:
            answer = say(answers or {})
            server = scripted(answer, engine=TracedEngine, per_step=per_step, api_key=api_key)
        scheme = "dark" if dark else "light"
        context = chromium.new_context(viewport=viewport, color_scheme=scheme, is_mobile=phone, has_touch=phone)
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.set_default_timeout(1000 * PATIENCE)
        ours = (server.url, f"blob:{server.url}", "data:")
        context.on("weberror", lambda fault: faults.append(str(fault.error)))
        context.on("request", lambda request: request.url.startswith(ours) or strangers.append(request.url))
        page = context.new_page()
        page.goto(server.url)
        chat = ChatPage(page, server)
        if api_key is None:
            chat.ready()
        return chat

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []
    assert strangers == []
