"""``FedParaModel``: how PEFT injects, saves, loads and merges FedPara layers."""

from .injection import FedParaModel

__all__ = ["FedParaModel"]
