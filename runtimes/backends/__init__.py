"""One file per inference engine; each imports its own SDK and nothing else."""
