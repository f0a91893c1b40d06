"""Reads the files of a job: found, opened once, decompressed, decoded, cut into lines with their fields."""
