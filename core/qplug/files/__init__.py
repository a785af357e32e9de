"""Files that somebody else wrote, read without trust: regular, of a limited size, typed."""
