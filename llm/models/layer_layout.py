"""Which layers a decoder has, in which order, and where their parameters are stored.

Layers repeat in a pattern of p layers (p = 1 for most models; 2 for Gemma 2's local and global attention). Layer i is
position i mod p of repeat i div p. The parameters of a position are stacked along a leading repeat axis, as
`layers/<position>/...`; the num_layers mod p layers that are left at the end are `remainder/<position>/...`, stacked
too, one deep. Layers that come before the pattern and are not of it (DeepSeek's first, dense ones) are
`leading/<index>/...`, likewise, and i counts from the first after them. Whatever runs the layers (scan, loop, pipeline)
only indexes these.
"""

from llm.models.layer import LayerConfig


class LayerLayout:
    """The layers of a configuration that has these attributes."""

    num_layers: int
    pattern: tuple[LayerConfig, ...]
    leading: tuple[LayerConfig, ...]

    @property
    def repeats(self) -> int:
        """How often the whole pattern occurs."""
        return (self.num_layers - len(self.leading)) // len(self.pattern)

    @property
    def remainder(self) -> tuple[LayerConfig, ...]:
        """The layers left after the last whole pattern."""
        return self.pattern[: (self.num_layers - len(self.leading)) % len(self.pattern)]

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """All of them, in order."""
        return tuple(self.layer(index) for index in range(self.num_layers))

    def groups(self) -> tuple[tuple[str, int, int], ...]:
        """The groups of stacked layers in the order in which they run: (name, repeats, index of the first layer)."""
        first = len(self.leading)
        last = first + self.repeats * len(self.pattern)
        return ('leading', 1, 0), ('layers', self.repeats, first), ('remainder', 1, last)

    def layer(self, index: int) -> LayerConfig:
        """The configuration of layer `index` of num_layers."""
        first = len(self.leading)
        return self.leading[index] if index < first else self.pattern[(index - first) % len(self.pattern)]

    def location(self, index: int) -> tuple[str, str, int]:
        """Where layer `index` is stored: (group, position, entry along the leading axis of the stacked parameters)."""
        if index < len(self.leading):
            return 'leading', str(index), 0
        repeat, position = divmod(index - len(self.leading), len(self.pattern))
        return ('layers', str(position), repeat) if repeat < self.repeats else ('remainder', str(position), 0)
