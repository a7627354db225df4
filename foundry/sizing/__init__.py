"""How much hardware a workload takes: an estimate from datasheets and from what was measured. Imports no torch."""
