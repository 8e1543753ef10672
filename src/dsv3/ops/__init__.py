"""Floor 1: operators. Each has a plain PyTorch reference, the specification, beside the faster version."""
