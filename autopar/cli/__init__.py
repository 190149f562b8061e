"""The command line: arguments to calls of the API, results and errors to text and exit codes.

Modules, in reading order: ``sources``, ``requests``, ``models``, ``terminal``, ``asking``, ``comparing``, ``drawing``, ``timing``,
``emitting``, ``commands``.
"""

from autopar.cli.commands import main

__all__ = ["main"]
