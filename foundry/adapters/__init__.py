"""What makes the foundry a part of other people's systems. Each needs its system's own package, which is no dependency
of ours."""
