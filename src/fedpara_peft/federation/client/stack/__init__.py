"""Many clients in one step: in whose batches, by which tensors, and whether it is right."""
