"""What the pictures of a run say; that they are drawn at all is tested with the runs."""

from __future__ import annotations

from dsv3.train.callbacks.plots import _names


def test_the_mtp_modules_layers_are_named() -> None:
    layers = ["1", "2", "3"]
    assert _names([{"mtp_loss": [4.0]}], layers) == {"1": "layer 1", "2": "layer 2", "3": "layer 3 (MTP)"}
    assert _names([{}], layers)["3"] == "layer 3"
