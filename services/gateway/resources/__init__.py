"""What a store has, as resources: cartridges, documents, runs."""
