"""Soak and chaos: real processes, random faults from one seed, and an account of what a viewer saw. docs/chaos.md."""
