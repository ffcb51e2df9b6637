"""The torch-free runtime: load a bundle and make images on any backend.

Nothing in this package imports PyTorch, diffusers or transformers (the file of the PyTorch
backend aside) and nothing in it knows a model family: a bundle's manifest says which graphs
there are, which tensors they exchange and which sampling plan drives them.
"""
