"""Options that several commands have."""

from typing import Any

import click

__all__ = ["kv_options"]

_KV = "f16, bf16, f32, q8_0 or q4_0: type of cached"


def kv_options(function: Any) -> Any:
    """-ctk and -ctv, as cache_type_k and cache_type_v."""
    for letter, what in (("v", "values"), ("k", "keys")):
        function = click.option(
            f"-ct{letter}",
            f"--cache-type-{letter}",
            default="f16",
            metavar="TYPE",
            help=f"{_KV} {what}. [f16]",
        )(function)
    return function
