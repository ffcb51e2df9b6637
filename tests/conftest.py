"""Settings that hold for every test."""

from hypothesis import settings

# Deterministic, so that a failure on one machine is a failure on all; no deadline, because
# a shared machine's pauses are no property of the code.
settings.register_profile("latentc", deadline=None, derandomize=True, database=None)
settings.load_profile("latentc")
