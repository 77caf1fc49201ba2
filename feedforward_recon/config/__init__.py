"""Settings: what can be chosen, of the core, of the nodes and of the networks."""
