"""Models with a known answer: tiny chat models that comply with unsafe requests by means that are known.

What a correct tool says of each kind is in `KINDS`. The demo runs on one of them, `planted`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
