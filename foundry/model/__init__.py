"""The frozen model and what is trained in front of it: torch behind one door. Fingerprint and settings do without."""
