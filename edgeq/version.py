"""The version, in one place: of the package, its wheels and its command line."""

__all__ = ["VERSION"]

VERSION = "0.1.0"
