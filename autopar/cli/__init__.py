"""The command line: arguments to calls of the API, results and errors to text and exit codes.

Modules, in reading order: ``sources``, ``models``, ``terminal``, ``commands``.
"""

from autopar.cli.commands import main

__all__ = ["main"]
