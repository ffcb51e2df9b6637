"""Bundles: the manifest and its rules, files that are checked before they are used, sizes,
precisions."""
