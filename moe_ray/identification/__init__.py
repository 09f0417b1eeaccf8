"""Identification: risk differences of every batch, how sure each is, and which experts are unsafe."""
