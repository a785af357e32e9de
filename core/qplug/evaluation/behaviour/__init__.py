"""A small suite of behaviour: thoughts that end, valid tool calls, no loops, a needle in a text."""
