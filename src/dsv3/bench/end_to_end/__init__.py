"""A model's whole way, from text to a served model, over several seeds, and a page of what came of it."""
