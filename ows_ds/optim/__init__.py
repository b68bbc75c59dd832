"""The algorithm, in the order of its way: sampling, layout, projection, low_rank, refresh, update, full_rank, ows."""
