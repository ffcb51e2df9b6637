"""Holds what families share: modules of graphs, and the parts of programs that feed them."""
