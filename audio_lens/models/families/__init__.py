"""The families: one file per architecture, which enters itself into the registry.

Every file of this folder is imported; nothing lists them.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
