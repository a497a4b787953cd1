"""The sums that stages make of tokens, by name: of losses, and under 'layers' those of routers."""

from typing import Any


def joined(sums: dict[str, Any], layers: Any) -> dict[str, Any]:
    """The sums of a loss, and those of layers that no stage has."""
    return {**sums, 'layers': {**sums.get('layers', {}), **layers}} if layers else sums


def added(total: Any, sums: Any) -> Any:
    """`total`, with `sums` of some of its entries added."""
    if not isinstance(sums, dict):
        return total + sums
    return {**total, **{name: added(total[name], each) for name, each in sums.items()}}
