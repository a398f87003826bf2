"""The console script `timm-dynamic`.

Commands are thin: `rows` computes plain values, `tables` shows them, `models` and `images` take what the user gives.
What needs torch is imported when a command runs.
"""

from .app import app, main

__all__ = ["app", "main"]
