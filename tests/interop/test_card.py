"""The model card says what it was told, with the published counts, and nothing about what it was not told."""

from baleen.interop.card import model_card
from baleen.recipe import load_recipe


def test_card_of_v3():
    config = load_recipe("v3-671b").model
    card = model_card(
        config, name="whale", tokens=1234567, heldout_bpb=1.69, sources=["a.txt"], cost="It took 3 hours."
    )
    assert card.startswith("---\n") and "# whale" in card
    for words in (
        "671,026,404,352",
        "70,272 bytes",
        "1,234,567",
        "1.6900",
        "a.txt",
        "## What it cost\n\nIt took 3 hours.",
    ):
        assert words in card


def test_what_is_unknown_is_left_out(tiny_config):
    card = model_card(tiny_config(num_nextn_predict_layers=0), name="krill")
    assert not any(words in card for words in ("None", "cost", "Tokens trained", "bits per byte", "MTP layers", "Text"))
