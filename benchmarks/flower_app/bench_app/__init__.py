"""Apps that the Flower benchmarks run; ``app`` in the run's configuration says which."""
