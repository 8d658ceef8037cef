"""What people and other tools read of an allocation: pictures and files."""
