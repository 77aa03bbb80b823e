"""What a certificate says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerBound:
    """One layer with a weight.

    Attributes:
        name: in the model.
        kind: type of the layer.
        bound: proven upper bound of its norm.
        coeff: the coefficient its parametrization aims at, or None.
    """

    name: str
    kind: str
    bound: float
    coeff: float | None


@dataclass(frozen=True)
class BlockBound:
    """One residual block x + g(x).

    Attributes:
        name: in the model.
        lipschitz: proven upper bound of Lip(g), or None.
        layers: its layers with a weight.
        obstacles: why there is no bound, each with its remedy.
    """

    name: str
    lipschitz: float | None
    layers: tuple[LayerBound, ...]
    obstacles: tuple[str, ...]

    @property
    def guaranteed(self) -> bool:
        """Whether Lip(g) < 1 is proven, and so the block's inverse."""
        return self.lipschitz is not None and self.lipschitz < 1


@dataclass(frozen=True)
class Certificate:
    """What is proven of a model's invertible part.

    "Proven" means: in exact arithmetic for the weights as stored, with a stated factor for the rounding of the
    computation. It holds until a weight, a buffer or the mode changes.

    Attributes:
        guaranteed: whether every block has a proven Lip(g) < 1 and everything between the blocks is invertible.
        scope: the chains of invertible modules that were judged; nothing is said of what stands outside of them.
        blocks: every residual block.
        lipschitz: proven bound of Lip(F) ≤ ∏(1 + L_i) (Behrmann et al. 2019, Lemma 2), with the factors of what
            stands between the blocks; None if some part has none, or where scope has several chains.
        inverse_lipschitz: the same of Lip(F⁻¹) ≤ ∏ 1/(1 − L_i).
        obstacles: every reason why it is not guaranteed, with its remedy.
    """

    guaranteed: bool
    scope: tuple[str, ...]
    blocks: tuple[BlockBound, ...]
    lipschitz: float | None
    inverse_lipschitz: float | None
    obstacles: tuple[str, ...]

    @property
    def largest_lipschitz(self) -> float | None:
        """The largest proven Lip(g) of a block; None where none is proven."""
        return max((block.lipschitz for block in self.blocks if block.lipschitz is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """The certificate as plain types, ready for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """The certificate as a Markdown text: the verdict, a table of blocks and one of layers."""
        lines = [f"**Guaranteed inverse: {'yes' if self.guaranteed else 'no'}**", ""]
        lines += [f"Judged: {', '.join(self.scope)}", ""]
        bounds = {"Lip(F)": self.lipschitz, "Lip(F⁻¹)": self.inverse_lipschitz}
        if known := [f"{name} ≤ {bound:.4g}" for name, bound in bounds.items() if bound is not None]:
            lines += [", ".join(known), ""]
        lines += [f"- {obstacle}" for obstacle in self.obstacles] + [""] * bool(self.obstacles)
        lines += ["| block | proven Lip(g) | invertible |", "|---|---|---|"]
        for block in self.blocks:
            verdict = "proven" if block.guaranteed else "not proven"
            lines.append(f"| {block.name} | {_number(block.lipschitz)} | {verdict} |")
        lines += ["", "| layer | kind | proven norm | coeff |", "|---|---|---|---|"]
        for block in self.blocks:
            for layer in block.layers:
                lines.append(f"| {layer.name} | {layer.kind} | {layer.bound:.6g} | {_number(layer.coeff)} |")
        return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"
