"""Programs being written: families say in it what calls of their pipelines do."""
