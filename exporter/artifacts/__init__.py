"""These modules hold what exports make and keep: its store, its sources, its libraries."""
