"""Programs captured by `torch.export`, and what is done with them before any target."""
