"""Scores and protocols (DESIGN §11)."""
