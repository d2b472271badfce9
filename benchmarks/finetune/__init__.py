"""Fine-tuning a pretrained language model in a federation, adapters of equal size side by side."""
