"""audio_lens: see, patch and time every activation of models that listen.

The public names are listed in ``__init__.pyi`` and imported on first use: torch and transformers
take seconds, the command line's help none.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
