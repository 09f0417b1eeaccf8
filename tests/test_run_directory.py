"""What a run directory holds is read as it was written."""

from __future__ import annotations

from dataclasses import asdict

from moe_ray.config.identify import IdentifyConfig
from moe_ray.config.io import to_yaml
from moe_ray.config.run import Config
from moe_ray.run_directory import FinishedRun
from moe_ray.storage.folder import Folder


def test_the_selection_is_that_of_the_masks_also_where_a_sweep_chose_it(tmp_path):
    folder = Folder.open(str(tmp_path))
    folder.write_bytes("config.yaml", to_yaml(Config()).encode())
    folder.sub("unsafe_experts").finish({"selection": asdict(IdentifyConfig(threshold=0.2, roles=("response",)))})
    assert FinishedRun(folder).selection == IdentifyConfig(threshold=0.2, roles=("response",))
    assert FinishedRun(folder).config.identify == IdentifyConfig()
