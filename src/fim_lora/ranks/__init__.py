"""From scores to ranks: pure functions of numbers, without torch and without PEFT."""
