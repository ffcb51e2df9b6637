"""The modules here hold a bundle to what it should be: results of PyTorch, programs beside
diffusers, builds on their engines.
"""
