"""Processes, wrappers, offloading, restored state and files, for all packages above."""
