"""Runs as Kubernetes Jobs. Imported only where they are: the client is large."""
