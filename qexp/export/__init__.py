"""Files that hold a quantized network as integers, and the engines that run them."""

from qexp.export.command import export

__all__ = ["export"]
