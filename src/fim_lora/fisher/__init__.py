"""From a backward pass to statistics of each target layer. Knows layers, not configs of PEFT."""
