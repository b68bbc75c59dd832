"""How much each layer matters: metrics, the scores file, sampling probabilities, plots."""
