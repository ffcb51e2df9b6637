"""A small text-to-image pipeline for images of coloured shapes, and all that makes it."""
