"""Optimisers: Optax pieces of our own, and the chain that composes them."""
