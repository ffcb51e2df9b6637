"""What an export holds a bundle to: results of PyTorch, programs beside diffusers, builds on
their engines."""
