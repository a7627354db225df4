"""Runs and their queue."""
