"""A tiny network and a server on a real socket, in a thread."""

import contextlib
import socket
import threading

from baleen.config import ModelConfig
from baleen.cost.money import rate_card
from baleen.data.tokenizer_training import SPECIAL_TOKENS
from baleen.serve.app import create_app
from baleen.serve.limits import Limits
from baleen.serve.models import Models, Served
from baleen.serve.server import Server, make_service

WORDS = "the cat sat on a mat and so did the dog, which saw naïve café birds: 1 2 3 {} [] over hills and far away "
TOKENS = 310  # of the tokenizer: special ones first
SHAPE = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "max_position_embeddings": 512,
    "initializer_range": 0.1,
}  # fmt: skip
CONFIG = ModelConfig(**SHAPE)
# A logit_bias: only tokens with text of their own, or a random network would end its answers by chance.
WORDY = {str(id): -100 for id in (*range(len(SPECIAL_TOKENS)), *range(TOKENS, CONFIG.vocab_size))}


@contextlib.contextmanager
def running(engines, *, limits=None, **options):
    """A server over {name: engine}; yields it with `.url`, `.port` and `.service`."""
    models = Models([Served(name, engine) for name, engine in engines.items()])
    service = make_service(models, limits or Limits(), rate_card("cpu"))
    ready = threading.Event()
    app = create_app(service, **options)
    server = Server(app, service, started=ready.set)
    server.app = app
    door = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server.port, server.service = door.getsockname()[1], service
    server.url = f"http://127.0.0.1:{server.port}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
