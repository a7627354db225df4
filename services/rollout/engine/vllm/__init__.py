"""The engine for GPU clusters: vLLM as it is, with cartridges put into its KV memory by its connector interface."""
