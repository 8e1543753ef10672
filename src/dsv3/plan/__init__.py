"""Floor 6: what a model or a run will take, before anything is bought or started."""
