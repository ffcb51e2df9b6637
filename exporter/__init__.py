"""The compiler: from a diffusers pipeline to a verified bundle. PyTorch lives here.

A family cuts a pipeline into components, each component is captured once with
``torch.export``, passes rewrite the captured program, targets lower it, the scheduler is
traced into sampling plans, and everything is verified before the bundle is called done.
"""
