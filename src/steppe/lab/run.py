"""A training run and its folder: one that stops after any epoch goes on to the same last bit."""

import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import steppe
from steppe.lab.config import Config
from steppe.lab.files import read_json, write
from steppe.lab.train import DivergedError, Training, step_memory

__all__ = ["Run"]


class Run:
    """A training run in its folder, `out/runs/<config.name>`.

    `config.json` says what runs; `checkpoint.pt` holds all that the next epoch needs, the weights included;
    `metrics.jsonl` has a line an epoch; `result.json` comes last and makes the run finished. A finished run
    is never run again; any other goes on from its last whole epoch, on the CPU to the same last bit as if it
    had not stopped.

    Args:
        config: what to train.
        out: folder of the study.
    """

    def __init__(self, config: Config, out: Path) -> None:
        self._read(config, out / "runs" / config.name)

    @classmethod
    def at(cls, folder: Path) -> "Run":
        """The run that a folder holds, whatever the folder is called."""
        run = cls.__new__(cls)
        run._read(Config(**read_json(folder / "config.json")), folder)
        return run

    def _read(self, config: Config, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.result: dict[str, Any] | None = None
        """Final figures, or why it "failed"; None until the run is finished."""
        self.records: list[dict[str, Any]] = []
        """A record an epoch, see `Training.epoch`."""
        self._training: Training | None = None
        result, metrics = self.folder / "result.json", self.folder / "metrics.jsonl"
        if result.exists():
            self.result = read_json(result)
            if not isinstance(self.result, dict) or not {"test_accuracy", "failed"} & set(self.result):
                raise ValueError(f"{result} is damaged (no accuracy in it): delete it, and what it held is made anew")
        if metrics.exists():
            try:
                self.records = read_json(metrics, lines=True)
                if not all(isinstance(each, dict) and {"epoch", "seconds"} <= set(each) for each in self.records):
                    raise ValueError(f"{metrics} is damaged (not an epoch a line): delete the folder, or get it again")
            except ValueError:
                if self.result is not None:
                    raise
                self.records = []  # the checkpoint of an unfinished run has them too

    @property
    def accuracy(self) -> float | None:
        """Final test accuracy, a share in [0, 1]; None if the run is not finished or has failed."""
        return None if self.result is None else self.result.get("test_accuracy")

    @property
    def failure(self) -> str | None:
        """Method, base, seed and reason of a run that failed; None for any other."""
        if self.result is None or "failed" not in self.result:
            return None
        return f"{self.config.title} seed {self.config.seed}: {self.result['failed']}"

    def advance(self) -> None:
        """Train one epoch and keep it on disk; after the last one, write the result.

        Raises:
            ValueError: if the config names what does not exist. A loss that is not finite is no error: it
                finishes the run, and the result says so under "failed".
            OSError: if a file cannot be written; what was written before stays good.
        """
        if self.result is not None:
            return
        training = self._training or self._start()
        if len(self.records) < self.config.epochs:
            try:
                record = training.epoch(len(self.records))
            except DivergedError as error:
                self._finish({"failed": str(error)})
                return
            self.records.append(record)
            content = io.BytesIO()
            torch.save({"training": training.state_dict(), "records": self.records}, content)
            write(self.folder / "checkpoint.pt", content.getvalue())
            self._write_records()
        if len(self.records) == self.config.epochs:
            self._finish(self._figures(training))

    def _start(self) -> Training:
        training = Training(self.config)
        write(self.folder / "config.json", json.dumps(asdict(self.config), indent=2) + "\n")
        self.records = []
        checkpoint = self.folder / "checkpoint.pt"
        if checkpoint.exists():
            try:
                state = torch.load(checkpoint, map_location=self.config.device, weights_only=True)
                training.load_state_dict(state["training"])
                self.records = state["records"]
            except Exception as error:  # of a damaged file, torch raises nearly anything
                reason = type(error).__name__
                raise ValueError(f"{checkpoint} is damaged ({reason}): delete it, and the run starts anew") from error
            self._write_records()
        self._training = training
        return training

    def _write_records(self) -> None:
        write(self.folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))

    def _figures(self, training: Training) -> dict[str, Any]:
        last, dataset = self.records[-1], training.dataset
        channels, size, _ = dataset.train.images.shape[1:]
        return {
            **{name: last[name] for name in ("test_accuracy", "test_loss", "train_loss", "propagations")},
            "seconds_per_step": sum(record["seconds"] for record in self.records) / last["steps"],
            "parameters": sum(p.numel() for p in training.model.parameters()),
            "peak_memory": step_memory(
                replace(self.config, seed=0, batch_size=min(self.config.batch_size, len(dataset.train))),
                dataset.classes,
                channels,
                size,
            ),
            "steppe": steppe.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }

    def _finish(self, result: dict[str, Any]) -> None:
        write(self.folder / "result.json", json.dumps(result, indent=2) + "\n")
        self.result = result
        self._training = None
