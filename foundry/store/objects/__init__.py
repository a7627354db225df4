"""What object storage holds: versions, documents, checkpoints."""
