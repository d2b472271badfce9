"""The examples' models, also without the package that loads their data; to be imported first."""

from __future__ import annotations

import sys
import types
from typing import Any


def _refuse(*_: Any, **__: Any) -> Any:
    raise ModuleNotFoundError("datasets is not installed, which loads the examples' data")


try:
    import datasets  # noqa: F401
except ImportError as error:
    print(f"models without their data: {error}", file=sys.stderr)
    absent = types.ModuleType("datasets")
    absent.Dataset = absent.load_dataset = _refuse  # type: ignore[attr-defined]
    sys.modules["datasets"] = absent
    try:
        from models import char_lstm, resnet18, vgg16
    finally:
        del sys.modules["datasets"]
else:
    from models import char_lstm, resnet18, vgg16

__all__ = ["char_lstm", "resnet18", "vgg16"]
