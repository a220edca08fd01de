"""qexp: one bench for low-bit quantization of image classifiers."""

__version__ = "0.1.0"
