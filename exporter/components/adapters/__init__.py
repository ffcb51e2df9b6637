"""Holds what adapters add to graphs and programs."""
