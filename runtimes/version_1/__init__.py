"""Bundles of format 1, for the upgrade alone."""
