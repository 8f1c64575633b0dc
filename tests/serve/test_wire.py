"""Raw bytes as the judge: what exactly goes over the socket, and what a rude client can do."""

import contextlib
import json
import socket
import threading
import time

import pytest
from served import WORDY, running

from baleen.serve.limits import Limits


def request(method, path, body=b"", **headers):
    """The bytes of a request that closes its connection."""
    fields = {"Host": "127.0.0.1", "Connection": "close", "Content_Length": len(body), **headers}
    fields.setdefault("Content_Type", "application/json")
    lines = [f"{method} {path} HTTP/1.1", *(f"{k.replace('_', '-')}: {v}" for k, v in fields.items() if v is not None)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def send(server, raw):
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(raw)
    return connection


def talk(server, raw):
    """(status, headers, body) of what comes back; chunked bodies are put together."""
    with send(server, raw) as connection:
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    status, *fields = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
    if headers.get("transfer-encoding") == "chunked":
        joined = b""
        while body:
            size, _, body = body.partition(b"\r\n")
            joined, body = joined + body[: int(size, 16)], body[int(size, 16) + 2 :]
        body = joined
    return int(status.split()[1]), headers, body


def post(server, path, value, **headers):
    return talk(server, request("POST", path, json.dumps(value).encode(), **headers))


def chat_body(model="script", content="hi", **options):
    return {"model": model, "messages": [{"role": "user", "content": content}], **options}


def error(body):
    fault = json.loads(body)["error"]
    assert set(fault) == {"message", "type", "param", "code"} and fault["message"]
    return fault["code"]


def events(body):
    """The data of each server-sent event, byte for byte as the standard wants them."""
    parts = body.split(b"\n\n")
    assert parts.pop() == b"" and all(part.startswith(b"data: ") and b"\n" not in part for part in parts)
    return [part[len(b"data: ") :] for part in parts]


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


# --- streams


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_one_terminal_chunk_then_usage_then_done(scripted, path, usage):
    server = scripted("one two three")
    body = chat_body() if "chat" in path else {"model": "script", "prompt": "hi"}
    body |= {"stream": True, "stop": ["three"], **({"stream_options": {"include_usage": True}} if usage else {})}
    status, headers, raw = post(server, path, body)
    assert status == 200 and headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events(raw)
    chunks = [json.loads(chunk) for chunk in chunks]
    assert done == b"[DONE]"
    if usage:
        last = chunks.pop()
        assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    if "chat" in path:
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
        assert all("role" not in delta for delta in deltas[1:])
        assert "".join(delta.get("content", "") for delta in deltas) == "one two "
    else:
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one two "


def test_each_choice_ends_once(scripted):
    server = scripted("one two")
    _, _, raw = post(server, "/v1/chat/completions", chat_body(stream=True, n=3))
    ends = [c["choices"][0]["index"] for c in map(json.loads, events(raw)[:-1]) if c["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]


def test_nulls_are_sent_where_the_protocol_has_them(scripted):
    _, _, raw = post(scripted("yes"), "/v1/chat/completions", chat_body())
    answer = json.loads(raw)
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage"}
    assert answer["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "yes"}, "logprobs": None, "finish_reason": "stop"}
    ]
    assert set(answer["usage"]) >= {"prompt_tokens_details", "completion_tokens_details", "total_tokens"}


# --- clients that go away


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_cache(scripted, stream):
    server = scripted("word " * 80, pause=0.02)
    connection = send(server, request("POST", "/v1/chat/completions", json.dumps(chat_body(stream=stream)).encode()))
    wait_until(lambda: server.engine.running == 1)
    connection.close()
    wait_until(lambda: server.engine.aborted == [0])
    assert server.engine.pages.in_use == 0 and not server.engine.has_work


def test_the_real_engine_frees_within_a_step(make_engine):
    """Each step waits for leave: after the disconnect is noticed only the one under way is given it."""
    engine, leave = make_engine(), threading.Semaphore(0)
    step, begun, ends, dropped = engine.step, [], [], []

    def step_with_leave():
        begun.append(engine.pages.in_use)
        leave.acquire()
        events = step()
        ends.extend(event.finish_reason for event in events if event.finish_reason)
        return events

    engine.step = step_with_leave
    with running({"tiny": engine}) as server:
        worker = server.service.worker
        drop = worker.drop
        worker.drop = lambda flight: (drop(flight), dropped.append(flight))
        try:
            body = json.dumps(chat_body("tiny", n=4, max_tokens=400, stream=True, logit_bias=WORDY)).encode()
            connection = send(server, request("POST", "/v1/chat/completions", body))
            leave.release(3)
            wait_until(lambda: len(begun) == 4)
            assert engine.running == 4 and begun[-1] > 0
            connection.close()
            wait_until(lambda: dropped)
            leave.release()
            wait_until(lambda: not engine.has_work)
            assert engine.pages.in_use == 0 and len(begun) == 4 and ends == []
        finally:
            leave.release(1000)


def test_clients_cut_off_at_random(make_engine):
    engine = make_engine()
    with running({"tiny": engine}) as server:
        body = json.dumps(chat_body("tiny", stream=True, max_tokens=40, seed=3, logit_bias=WORDY)).encode()
        whole = events(talk(server, request("POST", "/v1/chat/completions", body))[2])

        def client(number):
            connection = send(server, request("POST", "/v1/chat/completions", body))
            with contextlib.suppress(OSError):
                for _ in range(number % 7):
                    connection.recv(200)
            connection.close()

        threads = [threading.Thread(target=client, args=(i,)) for i in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: not engine.has_work)
        assert engine.pages.in_use == 0
        again = events(talk(server, request("POST", "/v1/chat/completions", body))[2])
        texts = [[json.loads(e)["choices"][0]["delta"].get("content") for e in each[:-1]] for each in (whole, again)]
        assert "".join(filter(None, texts[0])) == "".join(filter(None, texts[1]))


# --- bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"model": "tiny", "prompt": "\xf0\x9f\x90"}',  # three bytes of a whale
        b'{"model": "tiny", "prompt": "\xed\xa0\x80"}',
        b'{"model": "tiny", "prompt": "\\ud83d"}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"model": "tiny", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'\xef\xbb\xbf{"model": "tiny", "prompt": 1}',
        b'{"model": "tiny", "prompt": []}',
        b'{"model": "tiny", "prompt": [[]]}',
        b'{"model": "tiny", "prompt": [1, "a"]}',
        b'{"model": "tiny", "prompt": [-1]}',
    ],
    ids=range(17),
)
def test_broken_bodies_are_400(tiny, body):
    status, _, answer = talk(tiny, request("POST", "/v1/completions", body))
    assert status == 400 and error(answer) in ("invalid_json", "invalid_value")


def test_a_prompt_of_a_megabyte(tiny):
    for path, value in (
        ("/v1/completions", {"model": "tiny", "prompt": "whale " * 170_000}),
        ("/v1/chat/completions", chat_body("tiny", "w" * 1_000_000)),
    ):
        status, _, answer = post(tiny, path, value)
        assert status == 400 and error(answer) == "context_length_exceeded"


def test_a_form_is_no_json(tiny):
    """A web page elsewhere can send forms and plain text without asking; neither may be taken for a request."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        status, _, _ = post(tiny, "/v1/completions", {"model": "tiny", "prompt": "a"}, Content_Type=kind)
        assert status == 400


def test_bodies_are_bounded(scripted):
    server = scripted("yes", limits=Limits(body_bytes=1000))
    ok, long = json.dumps(chat_body()).encode(), json.dumps(chat_body(content="a" * 1000)).encode()
    assert talk(server, request("POST", "/v1/chat/completions", ok))[0] == 200
    status, _, body = talk(server, request("POST", "/v1/chat/completions", long))
    assert status == 413 and error(body) == "body_too_large"
    chunked = b"%x\r\n%b\r\n" % (len(long), long)
    head = request("POST", "/v1/chat/completions", Content_Length=None, Transfer_Encoding="chunked")
    status, _, body = talk(server, head + chunked + b"0\r\n\r\n")
    assert status == 413 and error(body) == "body_too_large"
    status, _, _ = talk(server, head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(ok), ok))
    assert status == 200


# --- limits


def test_limits_of_choices_prompt_queue_and_time(scripted, make_engine):
    server = scripted("word " * 90, limits=Limits(choices=2, prompt_tokens=30, request_seconds=2), pause=0.05)
    assert error(post(server, "/v1/chat/completions", chat_body(n=3))[2]) == "too_many_choices"
    many = {"model": "script", "prompt": ["a", "b", "c"]}
    assert error(post(server, "/v1/completions", many)[2]) == "too_many_choices"
    assert error(post(server, "/v1/chat/completions", chat_body(content="birds " * 30))[2]) == "context_length_exceeded"
    status, headers, body = post(server, "/v1/chat/completions", chat_body())
    assert status == 408 and error(body) == "request_timeout"
    assert headers["x-should-retry"] == "false"  # or OpenAI's clients would have it computed twice more
    status, _, body = post(server, "/v1/chat/completions", chat_body(stream=True))
    *chunks, last, done = events(body)
    assert status == 200 and done == b"[DONE]" and error(last) == "request_timeout" and chunks
    wait_until(lambda: server.engine.pages.in_use == 0)


def test_a_full_queue_and_a_long_wait_are_429(make_engine):
    now = [0.0]
    engine = make_engine(max_batch=1, max_queue=2, queue_seconds=60, clock=lambda: now[0])
    step = engine.step
    engine.step = lambda: (time.sleep(0.05), step())[1]
    with running({"tiny": engine}) as server:
        body = json.dumps(chat_body("tiny", logit_bias=WORDY)).encode()
        raw = request("POST", "/v1/chat/completions", body)
        first = send(server, raw)
        wait_until(lambda: engine.running == 1)
        waiting = [send(server, raw) for _ in range(2)]
        wait_until(lambda: engine.waiting == 2)
        status, headers, answer = talk(server, raw)
        assert status == 429 and error(answer) == "queue_full" and headers["retry-after"] == "1"
        now[0] += 61
        for connection in waiting:
            received = b"".join(iter(lambda c=connection: c.recv(65536), b""))
            assert received.startswith(b"HTTP/1.1 429") and b"queue_timeout" in received
        first.close()
        wait_until(lambda: not engine.has_work)
        assert engine.pages.in_use == 0


def test_a_failure_of_the_engine_is_told_and_shows(scripted):
    server = scripted(lambda prompt: RuntimeError("planted") if "break" in prompt else "fine")
    assert talk(server, request("GET", "/health"))[::2] == (200, b'{"status":"ok"}')
    assert post(server, "/v1/chat/completions", chat_body())[0] == 200
    status, _, body = post(server, "/v1/chat/completions", chat_body(content="break"))
    assert status == 500 and error(body) == "engine_failed" and b"planted" not in body
    assert talk(server, request("GET", "/health"))[0] == 503
    assert post(server, "/v1/chat/completions", chat_body())[0] == 500
    assert b"baleen_healthy 0.0" in talk(server, request("GET", "/metrics"))[2]


# --- doors


def test_a_key_opens_all_but_the_page(scripted):
    server = scripted("yes", api_key="sesame")
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
        for headers in (
            {},
            {"Authorization": "Bearer sesam"},
            {"Authorization": "Basic sesame"},
            {"Authorization": "Bearer \xe9"},
        ):
            status, answer, body = talk(server, request("GET", path, **headers))
            assert status == 401 and error(body) == "invalid_api_key" and answer["www-authenticate"] == "Bearer"
    assert post(server, "/v1/chat/completions", chat_body())[0] == 401
    assert talk(server, request("GET", "/v1/models", Authorization="Bearer sesame"))[0] == 200
    assert talk(server, request("GET", "/"))[0] == talk(server, request("GET", "/health"))[0] == 200
    assert talk(server, request("GET", "/health", Host="whale.example"))[0] == 200


def test_without_a_key_only_this_machine_is_answered(scripted):
    """Else a web page could name its own host 127.0.0.1 and talk to the server from within a browser."""
    server = scripted("yes")
    for host in ("localhost:80", "[::1]:80", "127.0.0.2", "127.0.0.2:80"):
        assert talk(server, request("GET", "/health", Host=host))[0] == 200
    for host in ("evil.example", "evil.example:80", "10.0.0.1", "127.0.0.1.evil.example"):
        assert talk(server, request("GET", "/health", Host=host))[0] == 403


def test_cors_is_for_the_origins_named(scripted):
    origin = {"Origin": "https://whale.example", "Access_Control_Request_Method": "POST"}
    asked = request("OPTIONS", "/v1/chat/completions", **origin)
    assert "access-control-allow-origin" not in talk(scripted("yes"), asked)[1]
    server = scripted("yes", origins=("https://whale.example",), api_key="sesame")
    status, headers, _ = talk(server, asked)
    assert status == 200 and headers["access-control-allow-origin"] == "https://whale.example"
    other = request("OPTIONS", "/v1/chat/completions", **{**origin, "Origin": "https://shark.example"})
    assert "access-control-allow-origin" not in talk(server, other)[1]


def test_every_response_has_the_policy(tiny):
    for raw in (request("GET", "/"), request("GET", "/nothing"), request("POST", "/v1/completions", b"{")):
        _, headers, _ = talk(tiny, raw)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers


def test_routes_that_are_not_there(tiny):
    status, _, body = talk(tiny, request("GET", "/v2/chat"))
    assert status == 404 and error(body) == "not_found"
    status, headers, body = talk(tiny, request("GET", "/v1/chat/completions"))
    assert status == 405 and headers["allow"] == "POST" and json.loads(body)["error"]["message"]
    for path in ("/page/../app.py", "/page/%2e%2e%2fapp.py", "/page/app.py"):
        assert talk(tiny, request("GET", path))[0] == 404


# --- the small endpoints


def test_tokenize(tiny, tokenizer):
    status, _, body = post(tiny, "/tokenize", {"model": "tiny", "prompt": "the cat <think>"})
    answer = json.loads(body)
    assert answer["tokens"] == [tokenizer.bos_id, *tokenizer.encode("the cat <think>")]
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 512
    messages = chat_body("tiny", "hi")["messages"]
    _, _, body = post(tiny, "/tokenize", {"model": "tiny", "messages": messages})
    assert json.loads(body)["tokens"] == tokenizer.encode_chat(messages, add_generation_prompt=True)
    assert post(tiny, "/tokenize", {"model": "tiny"})[0] == 400


def test_render(tiny):
    status, _, body = post(tiny, "/render", {"text": "**whale** <script>alert(1)</script>"})
    html = json.loads(body)["html"]
    assert "<strong>whale</strong>" in html and "<script" not in html


def test_metrics_count(scripted):
    server = scripted("yes")
    post(server, "/v1/chat/completions", chat_body())
    post(server, "/v1/chat/completions", chat_body("nobody"))
    status, headers, body = talk(server, request("GET", "/metrics"))
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#"))
    assert lines['baleen_http_responses_total{path="/v1/chat/completions",status="200"}'] == "1.0"
    assert lines['baleen_http_responses_total{path="/v1/chat/completions",status="404"}'] == "1.0"
    assert lines['baleen_answers_total{finish_reason="stop",model="script"}'] == "1.0"
    assert float(lines['baleen_completion_tokens_total{model="script"}']) >= 2
    assert lines['baleen_running{model="script"}'] == "0.0" and lines["baleen_healthy"] == "1.0"
    assert lines['baleen_first_token_seconds_count{model="script"}'] == "1.0"
