"""Attacks on a repaired model: is it still repaired under other prompts, other routes and other weights?"""
