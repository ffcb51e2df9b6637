"""Where a pipeline comes from: the Hub, a folder, a file; what is read of it, and what is not."""
