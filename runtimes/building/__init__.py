"""Engines that are built on the machine where a bundle runs."""
