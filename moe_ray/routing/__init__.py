"""Routing: tokens counted where they were really routed, and routed through masks."""
