"""`latentc bench`: cases in fresh processes, taking turns, and a report that knows its noise."""
