"""From a backward pass to statistics of each target layer. This package does not import PEFT."""
