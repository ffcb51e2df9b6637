"""Files that change a pipeline before it is exported, one file for each kind."""
