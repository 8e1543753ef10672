"""Floor 7: how good a model is."""
