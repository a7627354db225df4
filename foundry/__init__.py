"""Cartridge Foundry: KV-cache prefixes that stand in for long documents, trained and served with proof of identity."""

__version__ = "0.1.0"
