"""Files, and batches of requests that are answered when there is room."""
