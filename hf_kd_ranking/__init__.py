"""Cross-architecture knowledge distillation for efficient neural rankers, on Hugging Face.

Paper: Hofstätter et al. 2020, https://arxiv.org/abs/2010.02666. Importing the package registers its models with the
transformers Auto classes and does nothing else: every other public name, see `__init__.pyi`, is imported on first use.
"""

import lazy_loader as _lazy_loader

from . import models as _models  # noqa: F401, registers the models

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)
