"""Floor 4: tokenizer, sources, fill-in-the-middle, token shards, the loader, the chat template."""
