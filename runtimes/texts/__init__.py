"""Texts: tokenizers that are checked, weights of words, what encoders made of earlier texts."""
