"""Who asks, and what they may see, do and take."""
