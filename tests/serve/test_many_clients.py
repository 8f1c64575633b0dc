"""Many clients at once: each gets its whole right answer, and none is kept waiting."""

import asyncio
import json
import random
import statistics
import time

import pytest
from served import CONFIG, WORDY, running

from baleen.infer.engine import Engine, Request
from baleen.infer.sampler import SamplingParams
from baleen.model.transformer import Transformer

CLIENTS = 200


async def stream(port, body, begin):
    """(content, seconds until the first word, terminal chunks) of one streamed answer."""
    await begin.wait()
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(raw)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + raw)
    content, first, ends, done = "", None, [], False
    async for line in reader:
        if line.startswith(b"data: {"):
            choice = json.loads(line[6:])["choices"][0]
            if choice["delta"].get("content"):
                first = first or time.perf_counter() - started
                content += choice["delta"]["content"]
            ends += [choice["finish_reason"]] if choice["finish_reason"] else []
        done = done or line.startswith(b"data: [DONE]")
    writer.close()
    assert done
    return content, first, ends


async def storm(port, bodies):
    begin = asyncio.Event()
    tasks = [asyncio.create_task(stream(port, body, begin)) for body in bodies]
    await asyncio.sleep(0)
    begin.set()
    return await asyncio.gather(*tasks)


@pytest.mark.slow
def test_two_hundred_streaming_clients(tokenizer):
    """In float64, where an answer in a batch is exactly the answer alone; the words are drawn, each by its own seed."""
    model = Transformer(CONFIG).double().eval()
    model.init_weights(0)
    engine = Engine(model, tokenizer, speculate=1, max_queue=CLIENTS)
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "so", "did", "the", "dog"]
    bodies = []
    for seed in range(CLIENTS):
        prompt = " ".join(rng.choices(words, k=rng.randrange(1, 60)))
        length = rng.randrange(8, 40)
        message = {"role": "user", "content": prompt}
        bodies.append({"model": "m", "messages": [message], "seed": seed, "max_tokens": length, "logit_bias": WORDY})
    alone = Engine(model, tokenizer)
    bias = {int(id): value for id, value in WORDY.items()}
    with running({"m": engine}) as server:
        answers = asyncio.run(storm(server.port, bodies))
        assert engine.pages.in_use == 0 and not engine.has_work
    for body, (content, _, ends) in zip(bodies, answers, strict=True):
        ids = tokenizer.encode_chat(body["messages"], add_generation_prompt=True)
        # What chat takes for what a request leaves out.
        params = SamplingParams(0.7, 0.95, seed=body["seed"], max_tokens=body["max_tokens"], logit_bias=bias)
        completion = alone.complete([Request(ids, params)])[0]
        assert content == completion.text.lstrip() and ends == [completion.finish_reason] == ["length"]
    waits = [first for _, first, _ in answers]
    assert None not in waits
    assert max(waits) <= 3 * statistics.median(waits), (max(waits), statistics.median(waits))


def test_a_dozen_at_once(make_engine):
    """The same in small, for the fast tests: answers together are those alone, token by token from one seed."""
    with running({"m": make_engine()}) as server:
        message = {"role": "user", "content": "hills and far away"}
        body = {"model": "m", "messages": [message], "max_tokens": 12, "top_k": 20, "logit_bias": WORDY}
        bodies = [{**body, "seed": seed} for seed in range(12)]
        together = asyncio.run(storm(server.port, bodies))
        alone = [asyncio.run(storm(server.port, [body]))[0] for body in bodies]
        assert [answer[::2] for answer in together] == [answer[::2] for answer in alone]
        assert len({content for content, _, _ in together}) == 12
