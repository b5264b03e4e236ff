"""What depends on the computer: files that are whole or absent, paths, memory, precision, signals."""
