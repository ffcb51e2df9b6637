"""Calls: what a caller gives, checked against the programs of a bundle, and what of them it
needs."""
