"""Floor 4: models in files: Hugging Face folders in and out, and the checkpoints of a training run."""
