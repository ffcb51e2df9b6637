"""Measurements of bundles and of their peers, each case in a fresh process."""
