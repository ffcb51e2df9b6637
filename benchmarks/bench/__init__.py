"""`latentc bench`: cases in fresh processes, interleaved, with a report that says how sure it is."""
