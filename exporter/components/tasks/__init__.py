"""Parts of programs say what a pipeline can be asked for."""
