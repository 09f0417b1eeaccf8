from paths import ROOT

from moe_ray.config.docs import COMMAND, settings_page
from moe_ray.config.keys import keys_of


def test_the_page_of_settings_is_up_to_date():
    written = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert written == settings_page(), f"docs/settings.md is stale; write it with: {COMMAND}"


def test_the_page_has_every_setting_with_its_text_and_a_row_of_five_cells():
    rows = {line.split("`")[1]: line for line in settings_page().splitlines() if line.startswith("| `")}
    for key in keys_of():
        row = rows[key.name].replace("\\|", "/")
        assert row.count("|") == 6, row
        assert key.setting.text.replace("|", "/") in row
