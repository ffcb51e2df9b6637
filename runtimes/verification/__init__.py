"""Checks of a bundle on the machine where it runs."""
