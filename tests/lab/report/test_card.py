"""The card that goes with an exported model."""

from __future__ import annotations

from surgery.lab.report.card import render_card
from tests.lab.report.making import summary


def test_every_operation_is_there_with_what_it_came_to() -> None:
    heads = {layer: list(range(32)) for layer in range(32)}
    operations = [{"operation": "one", "heads": heads, "left_open": None}, {"operation": "other"}]
    outcomes = ["removes <all> heads", "changes nothing"]
    card = render_card(summary(operations=operations), outcomes)
    options = ", ".join(f"{layer}: {heads[layer]}" for layer in heads)
    assert f"\n- `one` (heads={{{options}}}): removes <all> heads\n" in card
    assert "\n- `other`: changes nothing\n" in card


def test_what_was_not_done_has_no_part() -> None:
    whole = render_card(summary(), ["something"])
    for part in ("## Training", "409,600 tokens, windows of 512", "| before | 1.0000 | 2.718 |"):
        assert part in whole
    nothing = {"before": None, "after_surgery": None, "after_training": None}
    bare = render_card(summary(operations=[], training=None, **nothing), [])
    assert bare.rstrip().splitlines() == [
        "---",
        "library_name: transformers",
        "---",
        "",
        "# LlamaForCausalLM by attention surgery",
        "",
        "Source: `tiny`.",
        "",
        "Longest input: 2,048 tokens.",
    ]
    unknown = {"export": summary()["export"] | {"positions": None}}
    assert "Longest input" not in render_card(summary(**unknown), ["something"])
