"""Images: read, written, masked, decoded in tiles."""
