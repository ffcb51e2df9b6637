"""Programs: what is done with a bundle's graphs in a call, as data that the runtime interprets."""
