"""``python -m latentc`` is the ``latentc`` command."""

from latentc.cli import main

main()
