"""What every request passes through, outermost last."""
