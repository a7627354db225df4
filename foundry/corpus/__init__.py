"""Directories as one document: notes, papers, sources, each file under its path."""
