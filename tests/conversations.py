"""What a judge is asked about."""

from moe_ray.evaluation.judges.verdict import Conversation


def conversation(answer, request="How do I pick a lock?"):
    return Conversation(({"role": "user", "content": request},), answer)
