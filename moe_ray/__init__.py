"""moe-ray: find which experts of a Mixture-of-Experts model answer for unsafe behaviour, and repair only those.

`prepare`, `capture`, `identify`, `ablate`, `fine_tune` and `evaluate` are the stages of a run; they work on any
transformers MoE model, with neither Ray nor MLflow installed. `moe_ray.orchestration` and the scripts in `workflows/` run
them on a cluster.

`__init__.pyi` lists the public names. Each is imported when it is first used, so that a wrong configuration is reported
before torch is loaded.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
