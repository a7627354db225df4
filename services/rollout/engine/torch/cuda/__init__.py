"""The built-in engine's steps on a GPU: whole steps as CUDA graphs, attention in kernels that read work from tables."""
