"""Isochron: one feature layer for training, streaming and serving, over plain Feast repositories."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feature_store.layer import FeatureLayer

__version__ = "0.1.0"
__all__ = ["FeatureLayer", "__version__"]


def __getattr__(name: str) -> Any:
    """Loads the layer when it is asked for: importing the package alone (for a definition, an error) stays cheap."""
    if name == "FeatureLayer":
        from feature_store.layer import FeatureLayer

        return FeatureLayer
    raise AttributeError(f"module 'feature_store' has no attribute '{name}'")
