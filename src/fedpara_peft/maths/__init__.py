"""Pure functions of tensors: ranks, composing a weight from factors, initialization."""
