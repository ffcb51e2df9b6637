"""Schedulers of diffusers, traced into tables of sampling plans."""
