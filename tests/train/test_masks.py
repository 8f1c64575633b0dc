"""A batch's loss mask and document ids reach the loss: the assistant's words are learnt, a document at a time."""

import pytest
import torch

from baleen.data.loader import Batch
from baleen.recipe import Recipe, TrainConfig
from baleen.train.loss import Objective, training_loss
from baleen.train.trainer import Trainer


class OneBatch:
    """A loader that gives the same batch for ever."""

    def __init__(self, batch):
        self.batch = batch

    def next_batch(self, sequences):
        return self.batch


@pytest.fixture
def batch(tiny_config):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 97, (4, 17), generator=generator)
    document_ids = torch.arange(17).expand(4, 17) // 6
    loss_mask = (torch.rand(4, 17, generator=generator) < 0.4).long()
    loss_mask[0] = 0  # a row from which nothing is learnt: shares by sequence would be wrong
    return Batch(tokens, document_ids, loss_mask)


def gradients(model, batch, **train):
    keys = {"tokens": 64, "batch_tokens": 64, "seq_len": 16, "lr": 1e-3, "precision": "fp32", "clip_norm": 1e9}
    recipe = Recipe(model=model.config, train=TrainConfig(**keys, **train))
    trainer = Trainer(recipe, model, OneBatch(batch))
    totals = trainer.worker.accumulate(
        trainer._micro_batches(batch), Objective(0.3, recipe.train.balance_loss_weight, "fp32")
    )
    return totals.main, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batch_size", [0, 1, 3])
@pytest.mark.parametrize("document_mask", [True, False])
def test_masks_reach_the_loss_in_every_micro_batch(tiny_model, batch, micro_batch_size, document_mask):
    """Of MTP's two depths and of the balance loss too, each of which has another share of the step."""
    keys = {"mtp_loss_weight": 0.3, "balance_loss_weight": 0.1}
    model = tiny_model(num_nextn_predict_layers=2)
    loss, found = gradients(
        model, batch, micro_batch_size=micro_batch_size, document_mask=document_mask, balance_loss_weight=0.1
    )
    twin = tiny_model(num_nextn_predict_layers=2)
    documents = batch.document_ids if document_mask else None
    expected = training_loss(twin, batch.tokens, document_ids=documents, loss_mask=batch.loss_mask, **keys)
    expected.total.backward()
    assert loss == pytest.approx(expected.main.item(), rel=1e-5)
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_pretraining_sees_across_documents_unless_told(tiny_config):
    assert TrainConfig(tokens=1, batch_tokens=1, seq_len=1, lr=1).document_mask is False
