"""Floor 0: what can be said about a model or a run, and whether it makes sense."""
