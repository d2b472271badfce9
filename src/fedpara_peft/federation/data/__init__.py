"""The clients' data: partitions, batches, labels, losses."""
