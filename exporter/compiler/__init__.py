"""One run of the compiler, from the arguments of an export to a bundle that is published."""
