"""Memory, traffic and time of a run, before anything runs."""
