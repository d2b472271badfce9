"""A client's turn: local training, stacked or alone, what it sends and keeps."""
