"""Decoding by CUDA graphs, as far as it goes without a GPU: what a graph computes, and that nothing in it waits."""

from contextlib import nullcontext

import pytest
import torch

from baleen.infer import graphs
from baleen.infer.graphs import GraphRunner
from baleen.infer.native.runner import fastest_runner
from baleen.infer.runner import TorchRunner
from baleen.model.cache import Batch, LatentPages
from baleen.model.transformer import Transformer


class Replayed(GraphRunner):
    """Its graphs are calls; counts them by shape."""

    def capture(self, step, *like):
        shapes = [tensor.shape for tensor in like]
        self.replays = getattr(self, "replays", [])

        def replay(*new):
            assert [tensor.shape for tensor in new] == shapes
            self.replays.append(tuple(shapes[1]))
            return step(*new)

        return replay


@torch.inference_mode()
def test_a_graph_of_a_larger_shape_says_what_each_sequence_alone_does(tiny_model, monkeypatch):
    model = tiny_model(dtype=torch.float64)
    tables = [[7, 1], [2, 9, 4], [3], [8, 0, 5, 6, 11]]
    starts, generator = [4, 8, 0, 17], torch.Generator().manual_seed(0)
    plain, graphed = (
        kind(model, LatentPages(model.config, 12, page_size=4, dtype=torch.float64)) for kind in (TorchRunner, Replayed)
    )
    monkeypatch.setattr(graphs, "WORTH_IT", 1)
    for who in ((0, 1, 2, 3), (1, 3), (2,), (0, 1, 3), (0, 1, 2, 3), (3, 1), (2,), (2,)):
        texts = [torch.randint(97, (starts[b] + 1,), generator=generator).tolist() for b in who]
        for runner in (plain, graphed):  # the prompts, which no graph reads
            read = [(text[:-1], b) for text, b in zip(texts, who, strict=True) if len(text) > 1]
            if read:
                counts = [len(text) for text, _ in read]
                tokens = [token for text, _ in read for token in text]
                runner.forward(Batch(tokens, [0] * len(read), counts, [tables[b] for _, b in read]))
        batch = Batch([text[-1] for text in texts], [starts[b] for b in who], [1] * len(who), [tables[b] for b in who])
        expected, found = plain.forward(batch), graphed.forward(batch)
        torch.testing.assert_close(found.hidden_Nd, expected.hidden_Nd, rtol=1e-10, atol=1e-12)
        for a, b in zip(found.experts, expected.experts, strict=True):
            assert torch.equal(a.sort().values, b.sort().values)
        torch.testing.assert_close(graphed.pages.latents, plain.pages.latents, rtol=1e-10, atol=1e-12)
    # sequences and pages, rounded up; each shape from its second meeting on
    assert graphed.replays == [(4, 6), (4, 6), (2, 6), (1, 1), (1, 1)]
    assert set(graphed._graphs) == {(4, 6), (2, 6), (1, 1)}
    assert [graphs._rounded(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 25)] == [1, 2, 3, 4, 6, 6, 8, 12, 12, 16, 32]


def test_nothing_in_a_step_waits_for_the_gpu(tiny_config, monkeypatch):
    """Tensors without numbers take a GPU's way, and refuse every operation whose result Python would have to know."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # such tensors know of none
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with torch.device("meta"), torch.inference_mode():
        model = Transformer(tiny_config(moe_intermediate_size=64, hidden_size=64)).bfloat16()
        runner = GraphRunner(model, LatentPages(model.config, 12, page_size=4, dtype=torch.bfloat16, device="meta"))
        hidden, *experts = runner._step(torch.empty(3, 4, dtype=torch.long), torch.empty(4, 2, dtype=torch.long))
    assert hidden.shape == (4, 64)
    assert [tuple(chosen.shape) for chosen in experts] == [(4, 3), (4, 3)]


@pytest.mark.parametrize(
    ("dtype", "capability", "experts", "takes"),
    [
        (torch.bfloat16, (9, 0), True, True),
        (torch.bfloat16, (10, 0), True, True),
        (torch.bfloat16, (8, 0), True, False),  # there grouped_mm reads on the CPU where its groups end
        (torch.float32, (9, 0), True, False),
        (torch.float32, (8, 0), False, True),
        (torch.float16, (7, 0), False, True),  # where bf16 would be slow
    ],
)
def test_graphs_are_for_gpus_whose_operators_wait_for_nothing(
    tiny_model, monkeypatch, dtype, capability, experts, takes
):
    monkeypatch.delenv("BALEEN_NATIVE", raising=False)
    changes = {"first_k_dense_replace": 1 if experts else 3, "num_nextn_predict_layers": int(experts)}
    on_cpu, model = tiny_model(dtype, **changes), tiny_model(dtype, **changes)
    pages = LatentPages(model.config, 2, page_size=4, dtype=dtype)
    assert not isinstance(fastest_runner(on_cpu, pages), GraphRunner)
    monkeypatch.setattr(Transformer, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert isinstance(fastest_runner(model, pages), GraphRunner) is takes
