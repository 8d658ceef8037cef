"""Ranks for trainers of transformers and TRL."""
