"""What every target is given: the scale, the data, the folder; and the networks that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..certificate import Certificate, certify
from ..data import ImageSplit
from ..models import IResNetClassifier, read_config
from ..training import TrainingConfig, load_run, train

# The papers' networks: what each changes in the configuration.
NETWORKS: dict[str, dict[str, Any]] = {
    "vanilla": {"coeff": None},
    "BN": {"coeff": None, "batch_norm": True},
    "c = 0.9": {"coeff": 0.9},
    "c = 0.7": {"coeff": 0.7},
    "c = 0.5": {"coeff": 0.5},
    "c = 0.3": {"coeff": 0.3},
}
CONSTRAINED = tuple(label for label, changes in NETWORKS.items() if changes["coeff"] is not None)


@dataclass(frozen=True)
class Scale:
    """How much is spent.

    Attributes:
        name: ``"smoke"``, ``"cpu"`` or ``"paper"``.
        configs: of the classifier, by the images' channels.
        flows: of the density, by the images' channels.
        network: settings that are changed in them.
        training: settings of its training that are changed.
        flow_training: the same of the flow's.
        reconstructed: test images that are reconstructed.
        steps: of training in one and two dimensions.
        samples: drawn or held out there.
        most_images: of training, and of the test; None for all.
    """

    name: str
    configs: Mapping[int, str]
    flows: Mapping[int, str]
    network: Mapping[str, Any]
    training: Mapping[str, Any]
    flow_training: Mapping[str, Any]
    reconstructed: int
    steps: int
    samples: int
    most_images: int | None = None


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "smoke",
            {1: "digits", 3: "cifar10-small"},
            {1: "digits-flow", 3: "digits-flow"},
            {"blocks": (1, 1), "hidden": (4, 4)},
            {"epochs": 1, "lr": 1e-2},
            {"epochs": 1},
            reconstructed=12,
            steps=30,
            samples=500,
            most_images=256,
        ),
        Scale(
            "cpu",
            {1: "mnist-small", 3: "cifar10-small"},
            {1: "mnist-flow", 3: "mnist-flow"},
            {},
            {"epochs": 10, "clip": 1.0},
            {"epochs": 2},
            reconstructed=200,
            steps=3000,
            samples=20_000,
        ),
        Scale(
            "paper",
            {1: "workshop-55", 3: "workshop-55"},
            {1: "iresnet-density-cifar10", 3: "iresnet-density-cifar10"},
            {},
            {},
            {"epochs": 200},
            reconstructed=10_000,
            steps=50_000,
            samples=50_000,
        ),
    )
}
_PUBLISHED_SETS: dict[tuple[tuple[int, ...], int], str] = {
    ((1, 28, 28), 10): "mnist",
    ((3, 32, 32), 10): "cifar10",
    ((3, 32, 32), 100): "cifar100",
}
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Trained:
    """A network of the papers' comparison, after training.

    Attributes:
        label: a key of :data:`NETWORKS`.
        model: in evaluation mode.
        test_error: share of wrong classes.
        certificate: of the network.
    """

    label: str
    model: IResNetClassifier
    test_error: float
    certificate: Certificate


@dataclass(frozen=True)
class Job:
    """One call of ``iresnet-fast reproduce``.

    Attributes:
        scale: how much is spent.
        data: images, or None for the targets that need none.
        out: folder of results.
        report: told what is being done, and how many of how many steps are.
        seed: of everything.
    """

    scale: Scale
    data: ImageSplit | None
    out: Path
    report: Report = field(default=lambda what, done, total: None)
    seed: int = 0

    @property
    def images(self) -> ImageSplit:
        """The data; at the smoke scale the first of it.

        Raises:
            ValueError: there is none.
        """
        data, most = self.data, self.scale.most_images
        if data is None:
            raise ValueError("this target needs images. Remedy: --data PATH")
        if most is None:
            return data
        return replace(
            data,
            train_images=data.train_images[:most],
            train_labels=data.train_labels[:most],
            test_images=data.test_images[:most],
            test_labels=data.test_labels[:most],
        )

    @property
    def device(self) -> torch.device:
        """A GPU where there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def published_set(self) -> str | None:
        """The set of the papers that has images of this shape and so many classes."""
        return _PUBLISHED_SETS.get((tuple(self.images.train_images.shape[1:]), self.images.n_classes))

    @property
    def published_heading(self) -> str:
        """Of the column of published figures."""
        return f"published, {self.published_set.upper()}" if self.published_set else "published"

    def classifier(self) -> tuple[dict[str, Any], TrainingConfig]:
        """Settings of the classifier with c = 0.9 and of its training, for the data.

        Raises:
            ValueError: images of other than one or three channels.
        """
        shape = tuple(self.images.train_images.shape[1:])
        if shape[0] not in self.scale.configs:
            raise ValueError(f"reproduce takes images of one or three channels, got {shape}")
        settings = read_config(self.scale.configs[shape[0]])
        training = {**settings.pop("training"), **self.scale.training, "seed": self.seed}
        settings |= {"in_shape": shape, "n_classes": self.images.n_classes, **self.scale.network}
        if self.scale.name == "paper":  # four times the channels by zeros, bottlenecks of a quarter
            settings |= {"inject": 3 * shape[0], "hidden": [shape[0] * 4**stage for stage in range(3)]}
        return settings, self._training(training)

    def flow(self) -> tuple[dict[str, Any], TrainingConfig]:
        """Settings of the flow and of its training, for the data."""
        shape = tuple(self.images.train_images.shape[1:])
        settings = read_config(self.scale.flows[shape[0]])
        training = {**settings.pop("training"), **self.scale.flow_training, "seed": self.seed}
        settings |= {"in_shape": shape, "n_levels": self.images.n_levels, "n_classes": 0, **self.scale.network}
        return settings, self._training(training)

    def _training(self, settings: dict[str, Any]) -> TrainingConfig:
        """Grey images, which are of digits, are shifted and not mirrored, as in the papers."""
        colour = self.images.train_images.shape[1] == 3
        batch_size = min(settings["batch_size"], len(self.images.train_images))
        return TrainingConfig(**{**settings, "batch_size": batch_size, "flip": colour and settings.get("flip", False)})

    def networks(self, labels: Iterable[str] = NETWORKS) -> list[Trained]:
        """Train these networks, or take them from the folder where an earlier target has."""
        settings, training = self.classifier()
        found = []
        for label in labels:
            folder = self.out / f"runs-{self.scale.name}" / label.replace(" = ", "")
            result = train(
                {**settings, **NETWORKS[label]},
                training,
                self.images,
                folder,
                resume=True,
                on_step=lambda step, total, loss, label=label: self.report(f"training {label}", step, total),  # type: ignore[misc]  # mypy infers no lambda with a default
            )
            model = load_run(folder).to(self.device)
            assert isinstance(model, IResNetClassifier)
            assert result.evaluation.test_error is not None
            found.append(Trained(label, model, result.evaluation.test_error, certify(model)))
        return found

    def settings(self) -> dict[str, Any]:
        """What the results depend on."""
        found: dict[str, Any] = {"scale": self.scale.name, "seed": self.seed, "torch": torch.__version__}
        if self.data is not None:
            network, training = self.classifier()
            data = self.images
            sizes = {"train_images": len(data.train_images), "test_images": len(data.test_images)}
            found |= {
                "network": network,
                "training": asdict(training),
                "data": {**sizes, "checksum": data.checksum()},
            }
        return found

    def command(self, target: str) -> str:
        """What makes the target again."""
        data = " --data PATH" if self.data is not None else ""
        seed = f" --seed {self.seed}" if self.seed else ""
        return f"iresnet-fast reproduce {target}{data} --scale {self.scale.name}{seed}"

    def about_networks(self) -> str:
        """What the networks are, for the notes."""
        shape = tuple(self.images.train_images.shape[1:])
        _, training = self.classifier()
        return (
            f"Networks: `{self.scale.configs[shape[0]]}`, {training.epochs} epochs, images in [−½, ½]. Published: 55 "
            "pre-activation blocks with ReLU and dropout, 200 epochs, images normalised by mean and standard deviation."
        )
