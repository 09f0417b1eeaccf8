import pandas as pd
import pytest

from moe_ray.errors import InputError
from moe_ray.prompts.pair_filter import (
    ATTACK_REFUSED,
    BOTH,
    SAFE_COMPLIED,
    UNANSWERABLE,
    pair_counts,
    pair_outcomes,
    unanswered_pairs,
)


def test_a_pair_is_kept_when_its_safe_form_is_refused_and_its_attack_complied_with():
    refused = {"a": (True, False), "b": (False, False), "c": (True, True), "d": (False, True)}
    answers = pd.DataFrame(
        [
            {"pair": pair, "label": label, "category": "", "refused": verdict}
            for pair, verdicts in refused.items()
            for label, verdict in zip(("safe", "unsafe"), verdicts, strict=True)
        ]
    )
    got = pair_outcomes(answers).set_index("pair")
    assert got["kept"].to_dict() == {"a": True, "b": False, "c": False, "d": False}
    assert got["reason"].to_dict() == {"a": "", "b": SAFE_COMPLIED, "c": ATTACK_REFUSED, "d": BOTH}
    assert pair_counts(got) == {"pairs": 4, "kept": 1, "dropped": {SAFE_COMPLIED: 1, ATTACK_REFUSED: 1, BOTH: 1}}
    lost = unanswered_pairs(pd.DataFrame({"pair": ["e", "e"], "category": ""}))
    counts = pair_counts(pd.concat([pair_outcomes(answers), lost], ignore_index=True))
    assert (counts["pairs"], counts["kept"], counts["dropped"][UNANSWERABLE]) == (5, 1, 1)
    with pytest.raises(InputError, match="one safe and one unsafe form"):
        pair_outcomes(answers.iloc[:-1])
