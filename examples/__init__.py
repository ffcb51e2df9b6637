"""Worked examples that ship with the repository."""
