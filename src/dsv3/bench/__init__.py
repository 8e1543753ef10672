"""Beside the trainer: what is measured against named peers in the same run."""
