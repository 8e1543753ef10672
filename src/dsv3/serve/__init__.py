"""Floor 6: the serving engine. One request is a sequence, one step a batch of pieces of sequences."""
