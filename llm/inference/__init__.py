"""Text out of a model: `sampling` picks a token, `generation` runs the decoding loop, `streaming` shows its text."""
