"""Runs the scripts of a page of the documentation one after the other, in this process.

Under torchrun every process runs it, and the first one writes what each script printed, or how it failed, as JSON:

    torchrun --standalone --nproc-per-node 2 -m tests.page_scripts docs/your-script.md results.json

With ``--one-device`` the scripts' ``autopar.compile`` returns the model itself, so they are what they were before autopar.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

import autopar

SCRIPT = re.compile(r"^## ([^\n]+)\n.*?^```python torchrun\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read_scripts(page: Path) -> dict[str, str]:
    """Heading -> the script under it."""
    return dict(SCRIPT.findall(page.read_text(encoding="utf-8")))


def keep_model(model: nn.Module, example_inputs: Any = None, **options: Any) -> nn.Module:
    """What stands for `autopar.compile` on one device."""
    model.data_shard = (0, 1)  # type: ignore[assignment]
    return model


def keep_states(source: nn.Module | torch.optim.Optimizer) -> dict[str, Any]:
    """What stands for `autopar.full_state_dict` on one device."""
    return source.state_dict()


def run(script: str, name: str) -> str:
    """What a script prints; where it fails, its traceback at the end."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            # Scripts compare two programs, so float32's rounding would hide differences.
            torch.set_default_dtype(torch.float64)
            exec(compile(script, name, "exec"), {"__name__": "__main__"})
        except Exception:
            traceback.print_exc(file=printed)
    return printed.getvalue()


def main(page: str, results: str, *flags: str) -> None:
    torch.set_num_threads(1)
    if "--one-device" in flags:
        autopar.compile = keep_model  # type: ignore[assignment]
        autopar.full_state_dict = keep_states
    scripts = read_scripts(Path(page))
    chosen = [flag for flag in flags if not flag.startswith("--")]
    printed = {name: run(script, name) for name, script in scripts.items() if not chosen or any(name.startswith(part) for part in chosen)}
    if int(os.environ.get("RANK", 0)) == 0:
        Path(results).write_text(json.dumps(printed), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
