"""Serving many clients at once, beside llama.cpp's server: tokens a second, on the same weights and prompts.

    python bench/serve.py --config S|M|L [--clients 1,8,16,32] [--llama-server PATH] [--json]
    python bench/serve.py --run RUN [--clients 1,16] [--stream] [--json]      any model, without a peer

Each server in its own process; they take turns, and both cores are for whoever is asked. --llama-server: the binary
that llama.cpp's own sources build (those in llama-cpp-python's sdist do: vendor/llama.cpp, target llama-server);
without it `python -m llama_cpp.server` is the peer, which answers one request at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contenders import gguf_file, machine, network
from rounds import in_turns, ratio

PATIENCE = 120.0  # seconds for a server to begin


def text(rng: random.Random, tokens: int) -> str:
    """Letters, nearly all of them tokens of their own in the benchmark's small tokenizer."""
    return "".join(rng.choice("bcfgjmopquvxyz") for _ in range(tokens))


@contextlib.contextmanager
def process(command: list[str], port: int) -> Iterator[None]:
    """A server that answers, as long as the block lasts."""
    url = f"http://127.0.0.1:{port}"
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            with (
                contextlib.suppress(urllib.error.URLError, OSError),
                urllib.request.urlopen(f"{url}/v1/models") as answer,
            ):
                json.load(answer)
                break
            if running.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"it does not start: {' '.join(command)}")
            time.sleep(0.2)
        yield
    finally:
        running.terminate()
        running.wait(30)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        return door.getsockname()[1]


class Exchange(asyncio.Protocol):
    """One request and all bytes that come back: what a client costs is taken from the servers, so this is little."""

    def __init__(self, request: bytes):
        self._request, self.received = request, bytearray()
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.answer.set_result(bytes(self.received))


def post(path: str, body: dict[str, object]) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + raw


def first_model(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
        return json.load(answer)["data"][0]["id"]


async def ask(port: int, body: dict[str, object]) -> tuple[int, float]:
    """One request on a connection of its own: (tokens written, seconds)."""
    started = time.perf_counter()
    request = post("/v1/completions", body)
    _, exchange = await asyncio.get_running_loop().create_connection(lambda: Exchange(request), "127.0.0.1", port)
    answer = await exchange.answer
    counts = re.findall(rb'"completion_tokens": ?(\d+)', answer)
    if not (answer.startswith(b"HTTP/1.1 200") and counts):
        raise SystemExit(f"the server says: {answer[:500]!r}")
    return int(counts[-1]), time.perf_counter() - started


async def drive(port: int, model: str, clients: int, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """`clients` at once, each with `requests` prompts one after the other, none like another of this run of servers."""
    rng = random.Random(f"{clients} {seed}")  # servers keep what they have read
    prompts = [[text(rng, args.prompt) for _ in range(args.requests)] for _ in range(clients)]

    async def client(own: list[str]) -> list[tuple[int, float]]:
        body: dict[str, object] = {"model": model, "max_tokens": args.tokens, "temperature": 0}
        if args.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return [await ask(port, {**body, "prompt": prompt}) for prompt in own]

    started = time.perf_counter()
    answers = [answer for own in await asyncio.gather(*map(client, prompts)) for answer in own]
    seconds = time.perf_counter() - started
    tokens = sum(count for count, _ in answers)
    return {"tokens": tokens, "tokens_per_second": tokens / seconds, "worst_seconds": max(s for _, s in answers)}


def peer_command(gguf: Path, port: int, args: argparse.Namespace) -> tuple[str, list[str]]:
    """Name and command of llama.cpp's server."""
    most, length = max(args.clients), args.prompt + args.tokens + 32
    threads = str(machine()["threads"])
    if args.llama_server:
        command = [str(args.llama_server), "-m", str(gguf), "-np", str(most), "-c", str(most * length), "-cb"]
        return "llama-server", [*command, "-t", threads, "--port", str(port), "--no-webui"]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--n_ctx", "2048"]
    return "llama_cpp.server (one request at a time)", [*command, "--n_threads", threads, "--port", str(port)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """{config, baleen, peers, ratios, machine}; rows by the number of clients."""
    gguf = None if args.run else gguf_file(network(args.config), args.config, "f32", args.cache)
    directory, ports = args.run or args.cache / args.config, [free_port(), free_port()]
    commands = {"baleen": [sys.executable, "-m", "baleen", "serve", str(directory), "--port", str(ports[0])]}
    if gguf and args.peer:
        commands |= [peer_command(gguf, ports[1], args)]
    runs: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in commands}
    with contextlib.ExitStack() as stack:
        for port, command in zip(ports, commands.values(), strict=False):
            stack.enter_context(process(command, port))
        servers = {name: (port, first_model(port)) for name, port in zip(commands, ports, strict=False)}
        for port, model in servers.values():
            asyncio.run(drive(port, model, 1, args, seed=-1))
        for clients in args.clients:
            for round_ in range(args.rounds):
                for name in in_turns(list(servers), round_):
                    run = asyncio.run(drive(*servers[name], clients, args, round_))
                    runs[name].setdefault(str(clients), []).append(run)
    for clients in map(str, args.clients):
        if len({run["tokens"] for of in runs.values() for run in of[clients]}) > 1:
            raise SystemExit(f"{clients} clients: not all answers of a round have as many tokens as asked for")
    ours, *peers = rows = {name: {clients: row_of(own) for clients, own in runs[name].items()} for name in runs}
    first = str(args.clients[0])
    ratios = {f"baleen {c} clients / {first}": ratio(row, rows[ours][first]) for c, row in rows[ours].items()}
    for peer in peers:
        ratios |= {f"baleen / {peer}, {c} clients": ratio(row, rows[peer][c]) for c, row in rows[ours].items()}
    return {
        "config": str(args.run or args.config),
        "baleen": rows[ours],
        "peers": {name: rows[name] for name in peers},
        "ratios": ratios,
        "machine": machine(),
    }


def row_of(runs: list[dict[str, float]]) -> dict[str, Any]:
    speeds = [run["tokens_per_second"] for run in runs]
    return {
        "tokens_per_second": statistics.median(speeds),
        "spread": (max(speeds) - min(speeds)) / statistics.median(speeds),
        "rounds": speeds,
        "tokens": runs[0]["tokens"],
        "worst_seconds": max(run["worst_seconds"] for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=("S", "M", "L"), default="M")
    parser.add_argument("--run", type=Path, help="what to serve instead of a configuration, as `baleen serve` takes it")
    parser.add_argument("--clients", type=lambda s: [int(n) for n in s.split(",")], default=[1, 8, 16, 32])
    parser.add_argument("--requests", type=int, default=1, help="of each client, a round")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stream", action="store_true", help="token by token, not whole answers")
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/bench-models"), help="the files of the models")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.llama_server is not None and not args.llama_server.is_file():
        parser.error(f"--llama-server {args.llama_server}: there is no such file")
    if args.run and args.llama_server:
        parser.error("--llama-server serves a configuration: leave it out with --run")
    if args.stream and not args.run:
        parser.error("--stream wants --run: most tokens of a configuration have no text to be sent")
    result = measure(args)
    if args.json:
        print(json.dumps(result))
        return
    for name, rows in {"baleen": result["baleen"], **result["peers"]}.items():
        for clients, row in rows.items():
            print(
                f"{name:42} {clients:>3} clients {row['tokens_per_second']:9,.1f} tokens/s  spread {row['spread']:4.0%}"
            )
    for name, times in result["ratios"].items():
        print(f"{name:60} {times:6.2f}")


if __name__ == "__main__":
    main()
