"""Two passes for fxcompress, as somebody else would publish them. Imports nothing: a pass is loaded when it is asked for."""
