"""The command: its address, its doors, its orderly end, its entry in the ledger."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from served import CONFIG, WORDY, running
from test_wire import chat_body, events, request, send, talk, wait_until

from baleen.config import UserError
from baleen.cost.ledger import read_rows
from baleen.cost.money import rate_card
from baleen.interop.huggingface import save_model
from baleen.model.machine import counted_devices, device
from baleen.model.transformer import Transformer
from baleen.serve import models
from baleen.serve.limits import Limits
from baleen.serve.models import Models, Served, load_models, name_of
from baleen.serve.server import Address, listen, rate_of, serve

RECIPE = """
name = "whale"
stages = [{ kind = "rl" }]
[cost]
project = "sea"
purpose = "final"
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tokenizer):
    """A run directory as post-training leaves it: recipe and model."""
    run = tmp_path_factory.mktemp("lab") / "whale"
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    model.init_weights(0)
    save_model(model, run / "model")
    tokenizer.save(run / "model")
    (run / "recipe.toml").write_text(RECIPE)
    return run


class Process:
    """`baleen serve` as a person starts it."""

    def __init__(self, *arguments, **env):
        command = [sys.executable, "-m", "baleen", "serve", *map(str, arguments)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "BALEEN_NATIVE": "off", **env}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        self.line = self.process.stderr.readline()
        while self.process.poll() is None and "http://" not in self.line:
            self.line += self.process.stderr.readline()
        self.address = self.line.partition("http://")[2].split()[0].split("/")[0] if "http://" in self.line else None

    def ask(self, **options):
        """An open connection on which an answer has been asked for."""
        host, _, port = self.address.rpartition(":")
        connection = socket.create_connection((host, int(port)), timeout=60)
        body = json.dumps({"model": "whale", "messages": [{"role": "user", "content": "hi"}], **options}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.address}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        self.process.stderr.close()


@pytest.fixture
def start():
    started = []

    def make(*arguments, **env):
        started.append(Process(*arguments, **env))
        return started[-1]

    yield make
    for process in started:
        process.end()


def rest(connection):
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


LONG = {"max_tokens": 200, "logit_bias": WORDY, "seed": 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_told_to_stop_it_ends_its_answers_and_then_itself(start, run_dir, number):
    server = start(run_dir, "--port", "0", "--grace-seconds", "300")
    connection = server.ask(stream=True, **LONG)
    received = connection.recv(300)
    server.process.send_signal(number)
    received += rest(connection)
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and b'"finish_reason":"length"' in received
    assert server.process.wait(300) == 0
    rows, torn = read_rows(next((run_dir.parent / "ledger").glob("whale-*.jsonl")))
    assert torn == 0 and rows[-1]["stage"] == "serve" and rows[-1]["event"] == "end"
    assert (rows[-1]["status"], rows[-1]["project"], rows[-1]["purpose"]) == ("done", "sea", "final")
    assert rows[-1]["tokens"] == 200 and rows[-1]["productive_device_seconds"] > 0


def test_the_grace_time_is_bounded(scripted):
    server = scripted("word " * 90, limits=Limits(grace_seconds=0), pause=0.1)
    raw = [request("POST", "/v1/chat/completions", json.dumps(chat_body(stream=s)).encode()) for s in (True, False)]
    streaming, whole = (send(server, one) for one in raw)
    received = streaming.recv(300)
    wait_until(lambda: server.engine.running == 2)
    server.should_exit = True
    received += rest(streaming)
    assert b"shutting_down" in received and received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert rest(whole).startswith(b"HTTP/1.1 503")


def test_a_process_that_cannot_serve_ends_with_2(start, run_dir):
    server = start(run_dir, "--host", "0.0.0.0")
    output = server.line + server.process.stderr.read()
    assert server.process.wait(300) == 2 and "--api-key" in output and "Traceback" not in output


def test_mistakes(run_dir):
    said = []
    for runs, words in (([run_dir / "nothing"], "neither a run"), ([run_dir, run_dir / "model"], "same name")):
        with pytest.raises(UserError, match=words):
            serve([str(run) for run in runs], Address(port=0), Limits(), say=said.append)
    with pytest.raises(UserError, match="take one of fp32, bf16, int8, int4"):
        serve([str(run_dir)], Address(port=0), Limits(), weights="int7", say=said.append)
    with pytest.raises(UserError, match="queue"):
        Limits(queue=0)
    assert said == []


def test_the_bill_is_of_the_device_that_computes(run_dir, monkeypatch):
    """By what is given, else by the run's recipe, else by the table."""
    models = [SimpleNamespace(run_dir=None), SimpleNamespace(run_dir=run_dir)]
    assert rate_of(models, 0.0) == rate_card("cpu") and rate_of(models, 0.5).usd_per_device_hour == 0.5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert device().type == "cuda" and counted_devices() == ("NVIDIA H100 80GB HBM3", 1)
    assert rate_of(models, 0.0) == rate_card("h100") != rate_card("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Abacus 3000")
    with pytest.raises(UserError, match="--usd-per-device-hour"):
        rate_of(models, 0.0)
    assert rate_of(models, 0.5).usd_per_device_hour == 0.5


def test_a_taken_port_is_a_mistake():
    with listen(Address(port=0)) as door, pytest.raises(UserError, match="--port"):
        listen(Address(port=door.getsockname()[1]))


HOSTS = {
    "127.0.0.1": False, "127.0.0.2": False, "::1": False, "localhost": False,
    "::": True, "10.0.0.1": True, "whale.example": True,
}  # fmt: skip


@pytest.mark.parametrize("host, open", HOSTS.items())
def test_beyond_this_machine_a_key_is_wanted(host, open):
    assert Address(host, api_key="sesame").host == host
    if open:
        with pytest.raises(UserError, match="--api-key"):
            Address(host)
    else:
        assert Address(host).api_key is None
    with pytest.raises(UserError, match="printable"):
        Address(host, api_key="")


def test_names_of_models(tmp_path, run_dir):
    assert name_of(str(run_dir)) == name_of(str(run_dir / "model")) == "whale"
    assert name_of(str(run_dir / "model-ema")) == "whale-ema"
    assert name_of("models/tiny.Q4_0.gguf") == "tiny.Q4_0" and name_of("smollm2") == "smollm2"


def test_nothing_waits_for_a_slow_reader(make_engine):
    """A client that takes nothing must not hold up the others."""
    engine = make_engine()
    with running({"tiny": engine}) as server:
        body = json.dumps(
            chat_body("tiny", stream=True, n=8, max_tokens=200, logit_bias=WORDY, baleen={"trace": True})
        ).encode()
        deaf = send(server, request("POST", "/v1/chat/completions", body))
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        quick = json.dumps(chat_body("tiny", stream=True, max_tokens=5)).encode()
        done = threading.Event()

        def ask():
            assert events(talk(server, request("POST", "/v1/chat/completions", quick))[2])[-1] == b"[DONE]"
            done.set()

        threading.Thread(target=ask).start()
        assert done.wait(60)
        deaf.close()


def test_served_models_need_names_of_their_own(make_engine):
    engine = make_engine()
    with pytest.raises(UserError, match="same name"):
        Models([Served("whale", engine), Served("whale", engine)])


def test_a_run_brings_its_system_message_and_its_ledger(make_engine, tmp_path, monkeypatch):
    engine = make_engine()
    monkeypatch.setattr(models, "load", lambda run: SimpleNamespace(path=tmp_path))
    (tmp_path / "generation_config.json").write_text('{"do_sample": false}')
    (model,) = load_models([str(tmp_path)], lambda loaded: engine)
    assert (model.system, model.run_dir, model.chat_params.temperature) == ("", None, 0.0)
    (tmp_path / "recipe.toml").write_text('system = "Be brief."\n')
    for path in (tmp_path, tmp_path / "model", tmp_path / "model-ema"):
        (run,) = load_models([str(path)], lambda loaded: engine)
        assert (run.system, run.run_dir) == ("Be brief.", tmp_path)
