"""Finds a pipeline on the Hub, in a folder or a file, and reads what an export needs of it."""
