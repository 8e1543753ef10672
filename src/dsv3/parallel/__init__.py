"""Floor 5: many processes. Applied to a model from outside; the model knows nothing of it."""
