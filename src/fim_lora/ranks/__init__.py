"""From scores to ranks, without torch and without PEFT."""
