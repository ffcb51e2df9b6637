"""One component lowered to one target, and what is chosen before: ranges, layers that stay,
computation that does not overflow."""
