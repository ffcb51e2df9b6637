"""Rewrites of a captured program, one per file, applied before any target lowers it.

A pass takes an ExportedProgram, changes it in place and returns how many places changed.
"""
