"""Everything that touches PEFT's classes."""
