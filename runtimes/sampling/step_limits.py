"""How many steps sampling plans may have."""

MAX_STEPS = 10_000  # of a plan that is read
MAX_TRACED = 1000  # of one that is made
