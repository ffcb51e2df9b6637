"""Presets: how much fidelity may be given for speed, and what was measured on this machine."""
