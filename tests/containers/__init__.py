"""Suites that need a container engine or a cluster: `make e2e-compose`, `make e2e-kube`. Not part of `make test`."""
