"""Core ML: on a Mac the engine, elsewhere an evaluator."""
