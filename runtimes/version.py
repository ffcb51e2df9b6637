"""The one place that states latentc's version (pyproject.toml reads it from here).

It stands in the lowest layer so that the compiler can write it into a bundle and the
command line can print it without the cost of ``importlib.metadata``.
"""

__version__ = "0.1.0"
