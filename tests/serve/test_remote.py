"""`baleen chat --url`: a server as the terminal's partner."""

import contextlib
import http.server
import io
import socket
import threading
import time
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from baleen import cli
from baleen.config import UserError
from baleen.data.document import Message
from baleen.infer.chat import Chat, answer_once, asked
from baleen.infer.sampler import SamplingParams
from baleen.serve.limits import Limits
from baleen.serve.remote import Remote

PARAMS = SamplingParams(temperature=0.25, top_p=0.5, seed=7)
MODELS = b'{"data": [{"id": "m"}]}'


@contextlib.contextmanager
def elsewhere(models, stream, *, status=200, length=None):
    """The URL of a server that is none of ours: it says these bytes, and that they are of this length."""

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(models)

        def do_POST(self):
            self.answer(stream)

        def answer(self, body):
            self.send_response(status)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_an_answer_streams_and_is_counted(scripted, tokenizer):
    server = scripted("naïve whales")
    out = io.StringIO()
    stats = answer_once(Remote(server.url), asked("hello"), out, io.StringIO(), PARAMS)
    assert out.getvalue() == "naïve whales\n"
    tokens = len(tokenizer.encode("naïve whales")) + 1
    assert (stats.tokens, stats.turns, stats.accepted) == (tokens, tokens, [0]) and stats.seconds > 0
    request = server.engine.requests[0]
    assert (request.params.temperature, request.params.top_p, request.params.seed) == (0.25, 0.5, 7)
    assert request.prompt_ids == tokenizer.encode_chat([Message("user", "hello")], add_generation_prompt=True)
    answer_once(Remote(server.url), asked("hello"), out, io.StringIO(), replace(PARAMS, seed=0))
    assert server.engine.requests[1].params.seed == 0


def test_a_conversation(scripted):
    server = scripted(lambda prompt: f"answer {prompt.count('<|user|>')}")
    screen = io.StringIO()
    chat = Chat(Remote(f"{server.url}/v1/"), Console(file=screen, width=100))
    for line in ("one", "two", "/stats", "/speculate on"):
        chat.take(line)
    assert [message.content for message in chat.messages] == ["one", "answer 1", "two", "answer 2"]
    assert "tokens read" in screen.getvalue() and "a server decides" in screen.getvalue()


def test_reasoning_is_shown_as_the_model_wrote_it(scripted):
    server = scripted("<think>\nhm</think>\n\nso")
    assert "".join(Remote(server.url).reply([Message("user", "x")], PARAMS, False)) == "<think>\nhm</think>\nso"


def test_old_turns_are_dropped_by_the_server(scripted):
    turns = [Message("user", "over hills and far away " * 20), Message("assistant", "so")] * 4
    reply = Remote(scripted("yes").url).reply([*turns, Message("user", "which birds")], PARAMS, False)
    assert reply.dropped >= 2 and "".join(reply) == "yes"


def test_what_goes_wrong_is_said(scripted, tiny):
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", "nonsense", "http://"):
        with pytest.raises(UserError, match="can't be reached"):
            Remote(url)
    with pytest.raises(UserError, match="take one of tiny, other"):
        Remote(tiny.url, "whale")
    locked = scripted("yes", api_key="sesame")
    with pytest.raises(UserError, match="API key"):
        Remote(locked.url)
    assert "".join(Remote(locked.url, api_key="sesame").reply([Message("user", "x")], PARAMS, False)) == "yes"
    slow = scripted("word " * 90, limits=Limits(request_seconds=1), pause=0.05)
    with pytest.raises(UserError, match="longer than 1 seconds"):
        list(Remote(slow.url).reply([Message("user", "x")], PARAMS, False))


@pytest.mark.parametrize(
    "models, stream",
    [
        (b"<html>", b""),
        (b'["x"]', b""),
        (MODELS, b'data: {"error": "busy"}\n'),
        (MODELS, b"data: {\n"),
        (MODELS, b'data: ["x"]\n'),
        (MODELS, b'data: {"choices": ["x"]}\n'),
    ],
)
def test_what_is_no_openai_api_is_said(models, stream):
    with elsewhere(models, stream) as url, pytest.raises(UserError, match="is it an OpenAI API"):
        list(Remote(url).reply([Message("user", "x")], PARAMS, False))


def test_a_connection_that_breaks_is_said():
    with elsewhere(MODELS, b"", length=99) as url, pytest.raises(UserError, match="connection to the server broke"):
        Remote(url)
    with elsewhere(b'{"error": {"mes', b"", status=500, length=99) as url, pytest.raises(UserError, match="status 500"):
        Remote(url)


def test_other_servers_have_chunks_of_their_own():
    """No delta, a null for an error, and an empty thought where there is none."""
    chunks = [
        b'{"choices": [{"index": 0}], "error": null}',
        b'{"choices": [{"delta": {"reasoning_content": "", "content": "Hel"}}]}',
        b'{"choices": [{"delta": {"reasoning_content": null, "content": "lo"}}]}',
        b'{"choices": [{"delta": null}]}',
        b'{"choices": []}',
        b"[DONE]",
    ]
    with elsewhere(MODELS, b"".join(b"data: %b\n\n" % chunk for chunk in chunks)) as url:
        assert "".join(Remote(url).reply([Message("user", "x")], PARAMS, False)) == "Hello"


def test_the_key_is_the_options_else_the_environments(scripted, monkeypatch, tmp_path):
    server, run = scripted("yes", api_key="sesame"), str(tmp_path / "nothing")
    ask = ["chat", "--url", server.url, "--prompt", "hi"]
    assert CliRunner().invoke(cli.app, [*ask, "--api-key", "sesame"]).exit_code == 0
    monkeypatch.setenv("BALEEN_API_KEY", "sesame")
    assert CliRunner().invoke(cli.app, ask).exit_code == 0
    assert "API key is missing or wrong" in str(CliRunner().invoke(cli.app, [*ask, "--api-key", "other"]).exception)
    assert "neither a run" in str(CliRunner().invoke(cli.app, ["chat", run]).exception)  # the key is for others


def test_stopping_to_listen_stops_the_server(scripted):
    server = scripted("word " * 90, pause=0.02)
    pieces = iter(Remote(server.url).reply([Message("user", "x")], PARAMS, False))
    next(pieces)
    next(pieces)
    pieces.close()
    until = time.monotonic() + 20
    while not server.engine.aborted:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert server.engine.pages.in_use == 0
