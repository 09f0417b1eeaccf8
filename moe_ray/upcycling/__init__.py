"""Dense models turned into MoEs."""
