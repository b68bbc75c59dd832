"""OWS inside other projects' training loops, one module each. Nothing here is imported unless it is asked for."""
