"""Networks in folders: weights, settings, and a card with what is proven of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from torch import nn

from ..certificate.certify import certify
from ..nn import SpectralNorm
from ..whole_file import replacing, write_whole

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"

_CARD = """---
library_name: iresnet_fast
license: {license}
tags:
- invertible-residual-network
- pytorch
---

# {title}

{description}

## Certificate

Of the weights as they were saved; `irf.certify(model)` proves it again.

{certificate}
## Use

```python
import iresnet_fast as irf

model = irf.models.{kind}.from_pretrained("path/to/this/folder")
```
"""


class Pretrained(nn.Module):
    """A network that can be kept in a folder; the base of the models."""

    config: Any

    @classmethod
    def from_config(cls, config: Any, **overrides: Any) -> Self:
        """Build a network from its settings."""
        raise NotImplementedError

    def save_pretrained(
        self, folder: str | Path, *, title: str = "", description: str = "", license: str = "unknown"
    ) -> None:
        """Write ``model.safetensors``, ``config.json`` and ``README.md``, a model card with the certificate.

        Args:
            folder: made where there is none; files of those names are replaced.
            title: of the card. Default: the type of the network.
            description: of the card.
            license: of the weights, for the card.

        Raises:
            ValueError: the network is in training mode, where its normalised weights are estimates; or has layers of
                other Lipschitz coefficients than its configuration says, as weights of the official code have; or is of
                several dtypes.
            OSError: a file cannot be written.
        """
        from safetensors.torch import save_file  # noqa: PLC0415  (an optional package)

        if self.training:
            raise ValueError("save_pretrained of a network in training mode. Remedy: model.eval() first")
        if len(dtypes := {str(value.dtype) for value in self.parameters()}) > 1:
            raise ValueError(
                f"save_pretrained of a network of {' and '.join(sorted(dtypes))}. Remedy: model.to(a dtype)"
            )
        for name, part in self.named_modules():
            if isinstance(part, SpectralNorm) and part.coeff != self.config.coeff:
                raise ValueError(
                    f"{name} holds its layer to {part.coeff:.6g}, and the configuration says {self.config.coeff}: the "
                    "folder would have another network. Remedy: keep what it was made from, as the official state dict"
                )
        folder, kind = Path(folder), type(self).__name__
        folder.mkdir(parents=True, exist_ok=True)
        certificate = certify(self).to_markdown()
        card = _CARD.format(
            title=title or kind, description=description, license=license, certificate=certificate, kind=kind
        )
        settings = json.dumps({"kind": self.config.kind, **asdict(self.config)}, indent=1)
        with replacing(folder / WEIGHTS) as beside:
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, beside, {"format": "pt"})
        write_whole(folder / CONFIG, settings + "\n")
        write_whole(folder / CARD, card)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The network that :meth:`save_pretrained` kept, in evaluation mode; its card proves nothing here.

        Args:
            folder: of the network. Nothing is downloaded.

        Raises:
            FileNotFoundError: files are missing; the message names them.
            ValueError: a file is damaged, or is of another kind of network.
        """
        from safetensors import SafetensorError  # noqa: PLC0415
        from safetensors.torch import load_file  # noqa: PLC0415

        folder = Path(folder)
        if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
            raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}. Remedy: save_pretrained writes them")
        try:
            model = cls.from_config(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
            state = load_file(folder / WEIGHTS)
            model.to(next(value.dtype for value in state.values() if value.is_floating_point()))
            model.load_state_dict(state)
        except (SafetensorError, json.JSONDecodeError, RuntimeError) as error:
            raise ValueError(f"the network in {folder} cannot be read: {error}") from error
        return model.eval()
