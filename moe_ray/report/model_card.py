"""The model card of a repaired model, and the configuration that makes it again. Prompts and answers are in neither."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import pandas as pd
import yaml

from moe_ray.config.fields import EMBEDDED
from moe_ray.config.for_others import checkpoint_for_others, name_of_place, settings_for_others
from moe_ray.report.before_after import WHENS, before_after_table
from moe_ray.report.certainty_text import known_significance
from moe_ray.report.html.how_made import how_it_was_made
from moe_ray.report.printable import printable
from moe_ray.run_directory import CAPTURE, IDENTIFY, PROMPTS, RunDirectory
from moe_ray.storage.stage import MADE, MANIFEST

CARD, REPRODUCE = "README.md", "reproduce.yaml"

_SHOWN = ("digests", "judge", "decoding", "seed", "finished")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def reproduce_yaml(run: RunDirectory, header: Mapping[str, Any], *, names_only: bool) -> str:
    """The run's settings as a configuration file, without where it was done; a hub model's revision is its commit.

    Args:
        run: that learned the experts.
        header: of its learned experts.
        names_only: files and folders are named without where they lie on this machine, for a file that others get.
    """
    settings = settings_for_others(run.config, names_only=names_only)
    captured, prepared = run.manifest(CAPTURE), run.manifest(PROMPTS)
    commit = None if captured is None else captured["inputs"].get("model revision")
    if commit:
        settings["model"]["revision"] = commit
    about = [f"moe-ray full --config {REPRODUCE}"]
    if names_only:
        if run.config.model.path != EMBEDDED:
            # The run's own setting may be relative to a folder that is not this one.
            settings["model"]["path"] = checkpoint_for_others(str(header["base"]))
        about.append(
            "Files and folders are named without where they were: put them beside this file, and run the command there."
        )
        if prepared is not None:
            about.append(f"Hashes of the data, as prompts/{MANIFEST} of a run has them: {_data_hashes(prepared)}.")
    else:
        about.append("Files are named by where they are on this machine, since it was made without --push-to-hub.")
    text: str = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return "".join(f"# {line}\n" for line in about) + text


def model_card(run: RunDirectory, header: Mapping[str, Any], *, name: str, licence: str = "") -> str:
    """The card as Markdown, with the metadata that model hubs read.

    Args:
        run: that learned the experts; parts that it has not done are left out.
        header: of its learned experts.
        name: of the repaired model.
        licence: identifier of the base's licence, such as `apache-2.0`; empty = not known.
    """
    base = _base(run, header)
    parts = [
        _metadata(base, licence),
        f"# {_cell(name)}",
        f"`{_cell(base)}` with {_counted(len(header['experts']), 'expert')} of "
        f"{len(header['layers']) * header['num_experts']} trained by moe-ray on targets for prompts that the base model "
        "should refuse, and for prompts that it should answer. All other weights are the base model's.",
        *_found(run),
        *_figures(run),
        _table("What it is made of", _made(run, header, base)),
        "## Licence\n\n"
        + (f"That of the base model: `{_cell(licence)}`." if licence else "That of the base model; it names none."),
        _how_to_reproduce(),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(base: str, licence: str) -> str:
    about: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["moe-ray"]}
    if _HUB_NAME.fullmatch(base):
        about["base_model"] = base
    if licence:
        about["license"] = licence
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---"


def _base(run: RunDirectory, header: Mapping[str, Any]) -> str:
    """The base model's name on the hub, or the last part of its folder: where that was is nobody's business."""
    path = run.config.model.path
    if path == EMBEDDED or _HUB_NAME.fullmatch(str(header["base"])):
        return path if path == EMBEDDED else str(header["base"])
    return PurePosixPath(str(header["base"])).name


def _found(run: RunDirectory) -> list[str]:
    if run.manifest(IDENTIFY) is None:
        return []
    sizes = [len(run.masks.selected[batch]) for batch in run.masks.batch_idx]
    said = f"{len(sizes)} batches of prompts have {min(sizes)} to {max(sizes)} unsafe experts each"
    tested = known_significance(run.certainty)
    if not tested.empty:
        said += f"; in {int(tested.sum())} of {len(tested)} at least one of them is significant"
    return [f"{said}."]


def _figures(run: RunDirectory) -> list[str]:
    summary = run.summary
    if summary is None:
        return ["## Held-out figures\n\nThe run that made it was not evaluated to its end."]
    table = before_after_table([summary.get(when) for when in WHENS]).rename(columns={"": "figure"})
    note = "Brackets are 95% intervals; the change is paired, prompt by prompt; n prompts."
    return [f"## Held-out figures\n\n{_markdown(table)}\n\n{note}"]


def _made(run: RunDirectory, header: Mapping[str, Any], base: str) -> dict[str, str]:
    made, prepared = how_it_was_made(run), run.manifest(PROMPTS)
    revision = run.config.model.revision if _HUB_NAME.fullmatch(base) else ""
    rows = {
        "base model": f"{base}{f', revision {revision}' if revision else ''}, {header.get('dtype', '')}".rstrip(", "),
        "base weights (hash)": str(header["base_hash"]),
        "masks (hash)": str(header["mask_hash"]),
        "prompts": ", ".join(map(name_of_place, run.config.prompts.files)),
        **{name: made[name] for name in _SHOWN if made.get(name)},
    }
    if prepared is not None:
        rows["data (hashes)"] = _data_hashes(prepared)
    return rows


def _data_hashes(prepared: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in prepared["notes"][MADE].items())


def _how_to_reproduce() -> str:
    version = importlib.metadata.version("moe-ray")
    return (
        f"## Reproduce\n\n`{REPRODUCE}` holds every setting; prompts are read from where it says, and are not part of this "
        "model.\n\n"
        f"```\npip install 'moe-ray[run]=={version}'\nmoe-ray full runs/again --config {REPRODUCE}\n"
        "moe-ray merge runs/again repaired\n```"
    )


def _table(title: str, rows: Mapping[str, str]) -> str:
    table = pd.DataFrame([{"what": name, "which": text} for name, text in rows.items()])
    return f"## {title}\n\n{_markdown(table)}"


def _markdown(table: pd.DataFrame) -> str:
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Text that neither ends a cell nor begins markup."""
    return re.sub(r"([|<>`\\])", r"\\\1", printable(" ".join(str(text).split())))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
