"""Several processes that train one run: rank 0 leads, the others compute shares of its gradient."""
