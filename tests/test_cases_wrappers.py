"""Accelerate, Fabric and the Trainer train a compiled model as one device would: one documented way each, on two ranks.

The packages aren't dependencies: what isn't installed is skipped.
"""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import autopar
from autopar.errors import InputError
from autopar.runtime.dispatch import gather
from tests.processes import spawn


class Regression(nn.Module):
    """Returns its loss in a dict, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.down(self.up(x).tanh())
        return {"loss": (y - labels).square().mean(), "logits": y}


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(8, generator=generator), "labels": torch.randn(2, generator=generator)} for _ in range(24)]


EXAMPLE = {"x": torch.zeros(8, 8), "labels": torch.zeros(8, 2)}


def build(size: int = 8) -> tuple[autopar.CompiledModule, torch.optim.Optimizer]:
    example = {name: x[:size] for name, x in EXAMPLE.items()}
    model = autopar.compile(Regression(), example, pins={"dp": 2, "fsdp": True}, inputs="local")
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)


def check_trained(model: nn.Module) -> None:
    expected = Regression()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, weight_decay=0)
    for batch in DataLoader(rows(), batch_size=8):
        optimizer.zero_grad()
        expected(**batch)["loss"].backward()
        optimizer.step()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(gather(p.detach()), q, atol=1e-6), name


def accelerate(folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = build(4)
    compiled = model
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(), batch_size=2))
    assert model is compiled
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            accelerator.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad()
    check_trained(model)
    with pytest.raises(InputError, match="full_state_dict"):
        accelerator.save_model(model, folder / "accelerate")


def lightning_fabric(folder: Path) -> None:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    model, optimizer = build()
    with pytest.raises(InputError, match="setup_optimizers"):
        fabric.setup(model)
    optimizer = fabric.setup_optimizers(optimizer)
    for batch in fabric.setup_dataloaders(DataLoader(rows(), batch_size=4)):
        optimizer.zero_grad()
        fabric.backward(model(**batch)["loss"])
        optimizer.step()
    check_trained(model)


def trainer(folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, _ = build()
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        label_names=["labels"],
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    used = Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows()[:8])
    used.train()
    assert used.model_wrapped is model
    check_trained(model)
    expected = Regression()
    expected.load_state_dict({name: gather(p.detach()) for name, p in model.named_parameters()})
    loss = expected(**next(iter(DataLoader(rows(), batch_size=8))))["loss"]
    assert used.evaluate()["eval_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


def run(rank: int, port: int, train: Callable[[Path], None], folder: Path) -> None:
    names: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "NODE_RANK": 0}
    os.environ.update(
        {name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost", MASTER_PORT=str(port), OMP_NUM_THREADS="1"
    )
    train(folder)


@pytest.mark.processes
@pytest.mark.parametrize("train", [accelerate, lightning_fabric, trainer], ids=lambda train: train.__name__)
def test_training_with(train: Callable[[Path], None], tmp_path: Path) -> None:
    package = "accelerate" if train is trainer else train.__name__
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} isn't installed")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    spawn(2, tmp_path, run, port, train, tmp_path)
