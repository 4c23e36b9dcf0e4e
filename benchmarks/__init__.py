"""What is measured, never promised: `make bench`."""
