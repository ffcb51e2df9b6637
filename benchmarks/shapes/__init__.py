"""The shapes of the built-in model: captions, scenes, drawing, and the judge of its images."""
