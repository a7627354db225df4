"""The built-in engine: any decoder of `transformers`, on CPU, CUDA or MPS."""
