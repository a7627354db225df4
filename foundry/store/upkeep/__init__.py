"""Sweeping, verifying and restoring what the store holds."""
