"""A small text-to-image pipeline for pictures of coloured shapes, and all that makes it."""
