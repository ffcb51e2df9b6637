"""The interpreter runs programs: the arguments of a call become values, statement by statement."""
