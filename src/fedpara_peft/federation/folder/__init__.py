"""A run's folder: checkpoints, clients' states, history, description."""
