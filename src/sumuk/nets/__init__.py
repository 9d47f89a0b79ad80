"""The networks: plain torch modules, their parameters named as in the published files. No input or output."""
