"""The recipe of a Mixture-of-Experts after a stage of retraining."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from dive.errors import UserError
from dive.model.recipe import Dense
from dive.moe.mixture import Mixture
from dive.moe.plug import plug_routers
from dive.retrain.curve import Curve
from dive.retrain.freezing import plug_adapters
from dive.retrain.training import Training
from dive.store import Artifact, identity, key_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "trained.safetensors"
"""Every parameter trained up to and with the stage."""
CURVE = "curve.safetensors"
"""Of every step, see :class:`dive.retrain.curve.Curve`."""
STAGE = "stage.json"
"""{"seconds": of training, interrupted runs included, "sizes": {parameter that the stage trained: its size}}"""


@dataclass(frozen=True, slots=True)
class Retrained:
    """A model after one more stage: routers plugged, adapters in place but not merged."""

    before: "Mixture | Retrained"
    artifact: Artifact
    """Of :func:`dive.retrain.stage.fit_stage`."""
    training: Training
    corpus: str
    """Identity of what it was trained on."""

    @property
    def key(self) -> str:
        return key_of("retrained", {"artifact": self.artifact, "storage": self.mixture.storage})

    @property
    def routed(self) -> bool:
        return True

    @property
    def seconds(self) -> float:
        return float(self._stage()["seconds"])

    @property
    def tokens(self) -> int:
        return self.training.stage.tokens

    @property
    def sizes(self) -> dict[str, int]:
        """{parameter that the stage trained: its size}; those that no gradient reaches are left out."""
        found: dict[str, int] = self._stage()["sizes"]
        return found

    @property
    def trained(self) -> int:
        return sum(self.sizes.values())

    @property
    def mixture(self) -> Mixture:
        """What the first stage began with."""
        return self.before.mixture

    @property
    def dense(self) -> Dense:
        """What everything began with."""
        return self.mixture.dense

    def materialised(self) -> "Retrained":
        """The same model with experts of their own, as it is exported."""
        return replace(self, before=self.before.materialised())

    def chain(self) -> "list[Retrained]":
        """The stages up to and with this one, in order."""
        return [*self.before.chain(), self]

    def curve(self, every: int) -> list[dict[str, float]]:
        """Points of the stage's curve, one every ``every`` steps and at the end."""
        recorded = Curve.of(load_file(self.artifact.path / CURVE))
        return recorded.points(every, tokens=self.training.step_tokens, steps=self.training.steps)

    def load(self) -> "PreTrainedModel":
        return self.dense.slot.get(self.key, self._assemble)

    def take(self, *, master_weights: bool) -> "PreTrainedModel":
        """The model for one who trains it further.

        Args:
            master_weights: keep what was trained in the element type it was trained in.
        """
        if not master_weights:
            return self.dense.slot.take(self.key, self._assemble)
        self.dense.slot.clear()
        return self._assemble(master_weights=True)

    def _assemble(self, *, master_weights: bool = False) -> "PreTrainedModel":
        model = self.mixture.assemble()
        plug_routers(model, noise=self.training.noise)
        for stage in self.chain():
            plug_adapters(model, stage.training.stage.train, stage.training.lora)
        state = load_file(self.artifact.path / WEIGHTS)
        if master_weights:
            for name, parameter in model.named_parameters():
                if name in state:
                    parameter.data = parameter.data.to(state[name].dtype)
        unexpected = model.load_state_dict(state, strict=False).unexpected_keys
        if unexpected:
            name = self.training.name
            raise UserError(f"store: the artifact of stage {name} has parameters the model lacks: {unexpected[:3]}")
        return model.eval()

    def _stage(self) -> dict[str, Any]:
        found: dict[str, Any] = self.artifact.read(STAGE)
        return found


@identity.register
def _(value: Retrained) -> str:
    return value.key
