"""What exports make and keep: where it is stored, and which sources and libraries made it."""
