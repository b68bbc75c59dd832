"""Ranks: how they meet, what they send each other, where the weights live, and how they end together."""
