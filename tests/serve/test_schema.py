"""What the app says it takes, it takes; whatever else it gets, it stays whole: schemathesis and mutated requests."""

import http.client
import json
import random
import re

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.core import NotSet
from served import running

from baleen.serve.app import numbers_below
from baleen.serve.limits import Limits

POSTS = ("/v1/chat/completions", "/v1/completions")
LIMITS = Limits(choices=4)


class Connection:
    """One kept alive, as clients do; a server that hangs fails the test by its timeout."""

    def __init__(self, server):
        self._server, self._http = server, None

    def post(self, path, body):
        if self._http is None:
            self._http = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=60)
        self._http.request("POST", path, body, {"Content-Type": "application/json"})
        response = self._http.getresponse()
        raw = response.read()
        if response.will_close:
            self._http = None
        return response.status, raw


def has_text(raw):
    """Whether a body of status 200 says something."""
    if raw.startswith(b"data: "):
        assert raw.endswith(b"data: [DONE]\n\n") and b'"error"' not in raw
        chunks = [json.loads(line[6:]) for line in raw.split(b"\n\n") if line.startswith(b"data: {")]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        return any(choice.get("text") or any(choice.get("delta", {}).values()) for choice in choices)
    choices = json.loads(raw)["choices"]
    return any(choice.get("text") or any(list(choice.get("message", {}).values())[1:]) for choice in choices)


def explore(server, path, mode, count):
    """Requests of schemathesis: {status: how many}, of which 200 only with text."""
    schema = schemathesis.openapi.from_dict(server.app.openapi())
    connection, seen = Connection(server), {}

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(schema[path]["POST"].as_strategy(generation_mode=mode))
    def one(case):
        body = case.body if isinstance(case.body, bytes) else b""
        if not isinstance(case.body, bytes | NotSet):
            body = json.dumps(case.body, default=repr).encode()
        status, raw = connection.post(path, body)
        assert status in (200, 400, 404), (status, body, raw)
        if status == 200 and mode is GenerationMode.POSITIVE:
            status = 200 if has_text(raw) else "silent"
        elif status != 200:
            assert set(json.loads(raw)["error"]) == {"message", "type", "param", "code"}
        seen[status] = seen.get(status, 0) + 1

    one()
    return seen


def check_freed(server):
    for model in server.service.models:
        assert model.engine.pages.in_use == 0 and not model.engine.has_work


@pytest.mark.parametrize("path", POSTS)
def test_valid_requests_are_answered(scripted, path):
    server = scripted("yes, of course", limits=LIMITS)
    seen = explore(server, path, GenerationMode.POSITIVE, 60)
    assert seen[200] >= 0.3 * sum(seen.values()), seen
    check_freed(server)


@pytest.mark.parametrize("path", [*POSTS, "/tokenize", "/render"])
def test_invalid_requests_are_refused(scripted, path):
    server = scripted("yes", limits=LIMITS)
    seen = explore(server, path, GenerationMode.NEGATIVE, 30)
    assert seen.get(400, 0) > 0.2 * sum(seen.values()), seen  # what it breaks besides the body is not sent
    check_freed(server)


@pytest.mark.parametrize("limit", [1, 9, 10, 320, 4096, 129280])
def test_numbers_below(limit):
    matches = re.compile(numbers_below(limit)).match
    for number in {0, 1, 9, 10, 99, limit // 2, limit - 1, limit, limit + 1, 10 * limit}:
        assert bool(matches(str(number))) == (number < limit)


# --- mutations

X = [{"role": "user", "content": "x"}]
TALK = [{"role": "system", "content": "é"}, {"role": "user", "content": "🐋"}]
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CHAT = (
    {"messages": X, "max_tokens": 4, "stream": True},
    {"messages": TALK, "n": 2, "max_tokens": 3, "stop": ["a", "bc"], "seed": 7, "temperature": 0.5, "top_p": 0.9},
    {"messages": X, "max_tokens": 5, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 3}},
    {"messages": X, "max_tokens": 5, "response_format": {"type": "json_object"}},
    {"messages": X, "max_tokens": 6, "tool_choice": "required", "tools": [{"type": "function", "function": TOOL}]},
)
TEXT = (
    {"prompt": "the dog", "max_tokens": 3, "echo": True, "logprobs": 1},
    {"prompt": [1, 20, 30, 300], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
    {"prompt": ["a", "b"], "max_tokens": 2, "frequency_penalty": 1.0, "presence_penalty": -1.0},
    {"prompt": "def f(", "suffix": ")", "max_tokens": 3, "baleen": {"trace": True}},
)
SEEDS = [
    *(("/v1/chat/completions", body) for body in CHAT),
    *(("/v1/completions", body) for body in TEXT),
    ("/tokenize", {"prompt": "naïve"}),
    ("/render", {"text": "# a $x^2$ `b`"}),
]
SPICE = (
    b'"', b"{", b"}", b"[", b"]", b":", b",", b"null", b"true", b"-1", b"1e309", b"0.5", b"\\", b"\xff",
    b"\xf0\x9f", b"\\ud800", b"\x00", b"9" * 40, b'""', b"[[[[", b"<|user|>", b"NaN",
)  # fmt: skip


def mutated(rng, model):
    path, seed = rng.choice(SEEDS)
    body = bytearray(json.dumps({**seed, **({} if path == "/render" else {"model": model})}).encode())
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        at = rng.randrange(len(body) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            body[at:at] = rng.choice(SPICE)
        elif kind == 1:
            del body[at : at + rng.randrange(1, 12)]
        elif kind == 2 and at < len(body):
            body[at] = rng.randrange(256)
        else:
            other = rng.randrange(len(body) + 1)
            body[at:at] = body[other : other + rng.randrange(1, 20)]
    return rng.choice(("/v1/completions", path, path, path)), bytes(body)


def storm(server, count, seed=0):
    rng, connection, seen = random.Random(seed), Connection(server), {}
    for _ in range(count):
        path, body = mutated(rng, server.service.models.names[0])
        status, raw = connection.post(path, body)
        assert status < 500, (path, body, raw)
        seen[status] = seen.get(status, 0) + 1
    check_freed(server)
    return seen


def test_mutated_requests(tiny):
    seen = storm(tiny, 150)
    assert seen[200] > 20 and seen[400] > 20


@pytest.mark.slow
def test_ten_thousand_mutated_requests_and_flat_memory(make_engine):
    """No 5xx, no hang, no page left; and to what 2,000 requests leave in memory, 8,000 more add next to nothing."""
    with running({"tiny": make_engine()}, limits=LIMITS) as server:
        storm(server, 2000)
        before = resident_bytes()
        seen = storm(server, 8000, seed=1)
        assert resident_bytes() - before < 8 * 2**20
        assert min(seen[200], seen[400]) > 1000


@pytest.mark.slow
@pytest.mark.parametrize("path", POSTS)
def test_valid_requests_are_answered_by_the_real_engine(make_engine, path):
    with running({"tiny": make_engine()}, limits=LIMITS) as server:
        seen = explore(server, path, GenerationMode.POSITIVE, 300)
        assert seen[200] >= 0.3 * sum(seen.values()), seen
        check_freed(server)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
