"""The table of benchmarks in `docs/prompts.md` is that of the code."""

from __future__ import annotations

import re

from paths import ROOT

from moe_ray.prompts.schemas import SCHEMAS

PAGE = (ROOT / "docs" / "prompts.md").read_text()
ROWS = {line.split(" | ")[0].removeprefix("| "): line for line in PAGE.splitlines() if line.startswith("| ")}


def named(cell: str) -> list[str]:
    return [name.lower() for name in re.findall(r"`([^`]+)`", cell)]


def test_every_form_has_its_row_with_its_columns_labels_category_and_source():
    for schema in SCHEMAS:
        cells = ROWS[schema.name].removeprefix("| ").removesuffix(" |").split(" | ")
        _, columns, labels, category, pairs, source = cells
        assert set(named(columns.partition(";")[0])) == set(schema.columns), schema.name
        assert ("and no other" in columns) == schema.alone, schema.name
        assert source == schema.source
        if schema.label:
            assert named(labels) == [schema.label], schema.name
        elif schema.file_labels:
            assert set(named(labels)) == set(schema.file_labels), schema.name
        else:
            assert labels == ("by column" if schema.safe_prompt else "all unsafe"), schema.name
        assert named(category) == [schema.category] * bool(schema.category), schema.name
        assert (pairs != "–") == bool(schema.pair or schema.safe_prompt), schema.name


def test_the_page_has_no_form_that_the_code_does_not_know():
    table = PAGE.partition("| benchmark |")[2].partition("\n\n")[0].splitlines()[2:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table] == [schema.name for schema in SCHEMAS]
