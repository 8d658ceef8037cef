"""Pictures and files of an allocation, for people and for other tools."""
