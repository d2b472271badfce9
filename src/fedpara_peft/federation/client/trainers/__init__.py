"""transformers' trainers, and others like them, as a client's local training."""
