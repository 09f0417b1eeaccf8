"""Evaluation: held-out answers and losses, judged, with intervals and paired changes."""
