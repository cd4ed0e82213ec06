"""Trickle channels: segments over HTTP, read and written while they grow."""
