"""The engine that drives an external server of Tokasaurus' cartridge branch."""
