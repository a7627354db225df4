"""What Redis holds: pointers, and the bytes of the newest versions."""
