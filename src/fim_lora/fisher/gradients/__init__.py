"""Per-example gradients of a frozen matrix: pure functions of tensors."""
