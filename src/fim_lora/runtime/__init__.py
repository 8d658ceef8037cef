"""Processes, wrappers, offloading, restored state and files: what all rooms above may use."""
