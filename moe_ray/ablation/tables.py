"""How large effects are, how sure that is, and by what chance alone: the numbers behind a verdict.

    effect(S, x)   = [log p(own answer to x) - log p without S] / tokens of the answer             nats per token
    specific(S)    = mean effect on the batch's unsafe prompts - mean effect on its safe ones
    lift(control)  = specific(selected) - specific(control), mean over batches

The unit is the prompt: what is known of a batch is known through its prompts. Two things are compared with chance, and
both must be unlikely: the labels of a batch's prompts (`p_prompts`: is the effect on unsafe prompts another one than on safe
ones?) and which of its sets is the selection (`p_sets`: is it another one than that of other sets?). That both are needed
costs no correction: each alone keeps its level (Berger 1982, intersection-union test).

Shape suffixes: N prompts, B batches, D sets of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.ablation.chance import Labelled, holm, label_p, set_p
from moe_ray.ablation.expert_sets import BUSIEST, COALITION, FORCED, FORCED_MATCHED, GLOBAL, MATCHED, OTHER, SELECTED
from moe_ray.config.ablate import AblateConfig
from moe_ray.evaluation.mean_intervals import MeanInterval, mean_interval
from moe_ray.prompts.batches import MIXED

Floats = npt.NDArray[np.float64]

CONTROLS = (MATCHED, BUSIEST, OTHER, GLOBAL)
FEWEST = 2
"""Scored prompts of each label that a batch needs to count in figures over all batches."""
FEWEST_CATEGORIES = 4
"""From so many on, categories and not batches are what intervals count: batches of one category have much the same list."""


def set_means(effects: pd.DataFrame) -> pd.DataFrame:
    """A row per batch and set: `unsafe`, `safe` (mean effects), `specific`, their numbers `n_unsafe`, `n_safe`, and so on.

    Args:
        effects: from `measure_batch`, of any number of batches.
    """
    keys = ["batch_idx", "category", "set", "draw", "expert"]
    kinds = effects.assign(is_unsafe=effects["label"] == "unsafe")
    grouped = kinds.groupby([*keys, "is_unsafe"], sort=True)["effect"]
    means, sizes = grouped.mean().unstack("is_unsafe"), grouped.size().unstack("is_unsafe")
    nothing = pd.Series(math.nan, index=means.index)
    table = pd.DataFrame({"unsafe": means.get(True, nothing), "safe": means.get(False, nothing)})
    table["specific"] = table["unsafe"] - table["safe"]
    table["n_unsafe"] = sizes.get(True, nothing).fillna(0).astype(int)
    table["n_safe"] = sizes.get(False, nothing).fillna(0).astype(int)
    return table.join(kinds.groupby(keys)[["experts", "share"]].first()).reset_index()


def usable_batches(means: pd.DataFrame) -> list[int]:
    """The batches with enough scored prompts of each label, ascending."""
    own = means[(means["set"] == SELECTED) & (means[["n_unsafe", "n_safe"]].min(axis=1) >= FEWEST)]
    return sorted(int(batch) for batch in own["batch_idx"])


def clusters_of(categories: Sequence[str]) -> tuple[npt.NDArray[np.int64], str]:
    """What intervals count, a number for each batch, and its name: categories where there are four or more, else batches."""
    if len(set(categories)) < FEWEST_CATEGORIES or MIXED in categories:
        return np.arange(len(categories)), "batches"
    return np.unique(np.array(categories, dtype=object).astype(str), return_inverse=True)[1].astype(
        np.int64
    ), "categories"


def effect_table(effects: pd.DataFrame, config: AblateConfig, *, seed: int) -> pd.DataFrame:
    """A row per kind of set, over all usable batches; coalitions have a row for each size.

    Columns: `set`; `unsafe`, `safe`, `specific` with `specific_low`, `specific_high` (95%); `lift`, `lift_low`,
    `lift_high`, `p_sets` of the controls; `p_prompts` of the selection; `share`, `experts` (means), `batches`, `draws`.

    Args:
        effects: of all batches.
        config: `relabellings`.
        seed: of drawn relabellings and of resamples.
    """
    means = set_means(effects)
    batches = usable_batches(means)
    means = means[means["batch_idx"].isin(batches)]
    own = means[means["set"] == SELECTED].set_index("batch_idx").sort_index()
    rows = []
    for name in (SELECTED, *CONTROLS, FORCED, FORCED_MATCHED):
        of_set = means[means["set"] == name]
        if len(of_set):
            rows.append(_row(name, of_set, own, config, seed))
    for size, of_size in means[means["set"] == COALITION].groupby("draw"):
        rows.append(_row(f"{COALITION} {size}", of_size, own, config, seed))
    table = pd.DataFrame(rows)
    if len(table):
        groups = label_groups(effects[effects["batch_idx"].isin(batches)])
        table["p_prompts"] = [
            label_p(groups, limit=config.relabellings, seed=seed) if name == SELECTED else math.nan
            for name in table["set"]
        ]
    return table


def _row(name: str, of_set: pd.DataFrame, own: pd.DataFrame, config: AblateConfig, seed: int) -> dict[str, float | str]:
    by_batch = of_set.groupby("batch_idx")[["unsafe", "safe", "specific", "share", "experts"]].mean().sort_index()
    ours = own.loc[by_batch.index]
    clusters_B, _ = clusters_of(ours["category"].tolist())
    specific = _interval(by_batch["specific"].to_numpy(), clusters_B, seed)
    row: dict[str, float | str] = {
        "set": name,
        **{column: float(by_batch[column].mean()) for column in ("unsafe", "safe")},
        "specific": specific.value,
        "specific_low": specific.low,
        "specific_high": specific.high,
        "share": float(by_batch["share"].mean()),
        "experts": float(by_batch["experts"].mean()),
        "batches": len(by_batch),
        "draws": int(of_set.groupby("batch_idx").size().max()),
    }
    if name in CONTROLS:
        lift = _interval((ours["specific"] - by_batch["specific"]).to_numpy(), clusters_B, seed)
        row |= {"lift": lift.value, "lift_low": lift.low, "lift_high": lift.high}
    if name == MATCHED:
        draws_BD = of_set.pivot(index="batch_idx", columns="draw", values="specific").sort_index().to_numpy()
        row["p_sets"] = set_p(ours["specific"].to_numpy(), draws_BD, limit=config.relabellings, seed=seed)
    return row


def _interval(values_B: Floats, clusters_B: npt.NDArray[np.int64], seed: int) -> MeanInterval:
    return mean_interval(values_B, np.ones(len(values_B)), clusters_B, seed)


def label_groups(effects: pd.DataFrame) -> list[Labelled]:
    """The effects of the selections, prompt by prompt, in groups between which no prompt is shared.

    Batches that were asked the same prompts are one group, in which a prompt's effect is its mean over them: a prompt that
    ten batches were asked is still one prompt.

    Args:
        effects: of any number of batches.
    """
    own = effects[effects["set"] == SELECTED]
    group_of: dict[int, int] = {}
    seen: dict[str, int] = {}
    for batch, names in own.groupby("batch_idx")["id"]:
        batch_idx = int(str(batch))
        shared = {seen[name] for name in names if name in seen}
        group = min(shared, default=batch_idx)
        group_of = {key: group if value in shared else value for key, value in group_of.items()} | {batch_idx: group}
        seen = {key: group if value in shared else value for key, value in seen.items()} | dict.fromkeys(names, group)
    own = own.assign(group=own["batch_idx"].map(group_of))
    return [
        _labelled(rows.groupby("id", sort=False).agg({"effect": "mean", "label": "first", "pair": "first"}))
        for _, rows in own.groupby("group")
    ]


def _labelled(rows: pd.DataFrame) -> Labelled:
    return Labelled(
        rows["effect"].to_numpy(dtype=np.float64),
        (rows["label"] == "unsafe").to_numpy(),
        rows["pair"].to_numpy(dtype=object),
    )


def batch_table(effects: pd.DataFrame, answers: pd.DataFrame, config: AblateConfig, *, seed: int) -> pd.DataFrame:
    """A row per batch.

    Columns: `category`; `unsafe`, `safe`, `specific` of the selection, and of the matched sets with `matched_` before;
    `lift`; `p_prompts`, and `p_holm`, corrected for the number of batches (Holm 1979); `beats_every_draw`; `experts`,
    `share`; `n_unsafe`, `n_safe`, `refused` (unsafe prompts left out, as the model refuses them itself).

    Args:
        effects: of all batches.
        answers: of all batches.
        config: `relabellings`.
        seed: of drawn relabellings.
    """
    means = set_means(effects) if len(effects) else pd.DataFrame(columns=["batch_idx", "set", "n_unsafe", "n_safe"])
    usable = set(usable_batches(means)) if len(means) else set()
    rows = []
    for name, asked in answers.groupby("batch_idx"):
        batch = int(str(name))
        left_out = (asked["label"] == "unsafe") & (asked["state"] != "answered")
        row = {"batch_idx": batch, "category": asked["category"].iloc[0], "refused": int(left_out.sum())}
        of_batch = means[means["batch_idx"] == batch]
        for kind, prefix in ((SELECTED, ""), (MATCHED, "matched_")):
            found = of_batch[of_batch["set"] == kind]
            row |= {f"{prefix}{column}": found[column].mean() for column in _OF_A_SET} if len(found) else {}
        if batch in usable:
            own = effects[(effects["batch_idx"] == batch) & (effects["set"] == SELECTED)]
            row["p_prompts"] = label_p([_labelled(own)], limit=config.relabellings, seed=seed)
            row["lift"] = row["specific"] - row["matched_specific"]
            draws = of_batch.loc[of_batch["set"] == MATCHED, "specific"]
            row["beats_every_draw"] = bool((row["specific"] > draws).all())
        rows.append(row)
    table = pd.DataFrame(rows).reindex(columns=_BATCH_COLUMNS)
    table["beats_every_draw"] = table["beats_every_draw"].eq(True)
    table[["n_unsafe", "n_safe"]] = table[["n_unsafe", "n_safe"]].fillna(0).astype(int)
    table["p_holm"] = holm(table["p_prompts"].to_numpy(dtype=np.float64))
    return table


_OF_A_SET = ("unsafe", "safe", "specific", "share", "experts", "n_unsafe", "n_safe")
_BATCH_COLUMNS = [
    *("batch_idx", "category", "n_unsafe", "n_safe", "refused", "experts", "share", "unsafe", "safe", "specific"),
    *("matched_unsafe", "matched_safe", "matched_specific", "lift", "beats_every_draw", "p_prompts", "p_holm"),
]


def expert_table(effects: pd.DataFrame) -> pd.DataFrame:
    """A row per batch and single expert that was taken away.

    Columns: `batch_idx, category, expert`; `alone`, the specific effect of taking it away alone; `without_it`, what of the
    selection's specific effect is lost where it alone stays.
    """
    means = set_means(effects) if len(effects) else pd.DataFrame()
    if means.empty:
        return pd.DataFrame(columns=["batch_idx", "category", "expert", "alone", "without_it"])
    keys = ["batch_idx", "category", "expert"]
    alone = means[means["set"] == "alone"].set_index(keys)["specific"].rename("alone")
    spared = means[means["set"] == "spared"].set_index(keys)["specific"].rename("spared")
    table = pd.concat([alone, spared], axis=1).reset_index()
    own = means[means["set"] == SELECTED].set_index("batch_idx")["specific"]
    table["without_it"] = table["batch_idx"].map(own) - table["spared"]
    order = ["batch_idx", "alone", "expert"]
    return table.drop(columns="spared").sort_values(order, ascending=[True, False, True], ignore_index=True)
