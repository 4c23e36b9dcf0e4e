"""Fuzzing of the readers: `make fuzz`. See README.md in this folder."""
