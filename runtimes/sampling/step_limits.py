"""Sampling plans have at most so many steps."""

MAX_STEPS = 10_000  # of a plan that is read
MAX_TRACED = 1000  # of one that is made
