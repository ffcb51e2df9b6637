"""Files on this machine: read with limits, written whole, locked, mapped."""
