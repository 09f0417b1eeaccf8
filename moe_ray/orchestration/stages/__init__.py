"""The stages of a run, each reading what the ones before it made."""
