"""What depends on the computer: files, locks, paths, memory, precision, signals."""
