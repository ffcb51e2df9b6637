"""Sampling plans and the loop that follows them, the noise, and what happens to latents between
steps."""
