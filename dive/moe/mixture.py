"""The recipe of a Mixture-of-Experts that nothing was trained of yet."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dive.config import Storage
from dive.model.families.twin import Form
from dive.model.recipe import Dense
from dive.moe.assemble import assemble, assemble_indexed
from dive.moe.build import read_experts
from dive.store import Artifact, identity, key_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Mixture:
    """The dense model's attention, embeddings, norms and head, and the experts and routers of an artifact."""

    dense: Dense
    experts: Artifact
    """Of :func:`dive.moe.build.build_experts`."""
    top_k: int
    storage: Storage = Storage.materialised
    """What the experts rest in while the model is in memory."""
    form: Form = field(default_factory=Form)

    @property
    def key(self) -> str:
        inputs = {name: getattr(self, name) for name in ("dense", "experts", "top_k", "storage", "form")}
        return key_of("mixture", inputs)

    @property
    def routed(self) -> bool:
        return True

    @property
    def artifact(self) -> Artifact:
        return self.experts

    @property
    def seconds(self) -> float:
        return self.experts.seconds

    @property
    def tokens(self) -> int:
        return 0

    @property
    def trained(self) -> int:
        return 0

    @property
    def mixture(self) -> "Mixture":
        """Itself: what stages of retraining begin with."""
        return self

    def materialised(self) -> "Mixture":
        """The same model with experts of their own, as it is exported."""
        return replace(self, storage=Storage.materialised)

    def load(self) -> "PreTrainedModel":
        return self.dense.slot.get(self.key, self.assemble)

    def chain(self) -> list[Any]:
        """The stages of retraining up to here: none."""
        return []

    def take(self, *, master_weights: bool = False) -> "PreTrainedModel":
        """The model for one who changes it; nothing of it was trained, so that ``master_weights`` asks for nothing more."""
        return self.dense.slot.take(self.key, self.assemble)

    def assemble(self) -> "PreTrainedModel":
        """A new one."""
        build = assemble_indexed if self.storage is Storage.indexed else assemble
        return build(self.dense.load(), read_experts(self.experts), top_k=self.top_k, form=self.form)


@identity.register
def _(value: Mixture) -> str:
    return value.key
