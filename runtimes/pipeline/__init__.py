"""A loaded bundle, its calls and their results."""
