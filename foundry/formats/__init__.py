"""Cartridges as files, in our format and in those of others."""
