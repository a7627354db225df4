"""Collecting the garbage of what the store holds, verifying and restoring it."""
