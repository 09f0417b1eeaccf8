"""What a run found: as plain values, in words, in the terminal and on one HTML page."""
