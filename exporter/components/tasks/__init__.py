"""What a pipeline can be asked for, as parts of programs."""
