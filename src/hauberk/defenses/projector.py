"""TGA: trained weights of what connects picture and text, so that what a picture shows is refused.

The language model refuses a harmful request in words and answers it when a picture says the same.
The weights were trained (:mod:`hauberk.defenses.projector_training`) so that a picture does to the
decoder what its caption does; the refusal follows, though none was trained on.  What is changed:

    projector  all that connects tower and decoder: the ``multi_modal_projector`` of LLaVA and of
               InternVL, the ``merger`` of Qwen's tower, and the further mergers of a deepstack
    lora       the same, and low-rank changes of the decoder blocks up to the last aligned one
    decoder    the same, and all weights of the decoder's blocks and its last norm

The vision tower is never changed, nor is the table of words, which may be tied to the head.  A
bundle holds the changed tensors alone, or the factors of the low-rank changes.  These are always
applied as one product added to the weight, W + (alpha / r) B A in float32, so that a model with the
bundle applied and the checkpoint that is exported answer alike to the last bit.

Source: Xu et al., "Cross-Modal Safety Mechanism Transfer in Large Vision-Language Models" (TGA),
ICLR 2025, arXiv:2410.12662, who train projector and decoder whole; low rank: Hu et al., ICLR 2022,
arXiv:2106.09685.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_args
from weakref import WeakSet

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.anatomy import Anatomy, anatomy_of
from hauberk.bundle import Binding, Bound, Card, write_bundle
from hauberk.errors import TamperedBundle, UnsupportedRequest, WrongModel
from hauberk.files import replacing
from hauberk.requests import Request

Mode = Literal["projector", "lora", "decoder"]
Place = Literal["before", "after"]
FACTOR_A, FACTOR_B = ".lora_A", ".lora_B"
_TENSORS = "projector.safetensors"

_REPLACED: WeakSet[PreTrainedModel] = WeakSet()
"""Models whose weights are replaced now."""


@dataclass(frozen=True)
class Part:
    """Which weights of a model are trained.

    Raises
    ------
    ValueError
        If a word is not one of those named or a number is out of its range.
    """

    mode: Mode = "projector"
    last: int | None = None
    """Of ``lora``: the last decoder block that is changed, counted from 0; None for all."""
    rank: int = 16
    alpha: int = 32
    """The product of the factors counts alpha / rank; twice the rank is common practice."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            right = ", ".join(get_args(Mode))
            raise ValueError(f"mode: {self.mode!r} is not one of {right}.")
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank {self.rank}, alpha {self.alpha}: 1 or more, above 0 is right.")

    def whole(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Weights that are replaced as they are, by name."""
        anatomy = anatomy_of(model)
        modules = list(anatomy.connectors.values())
        if self.mode == "decoder":
            modules += [*anatomy.blocks, *_norms(anatomy)]
        wanted = {id(weight) for module in modules for weight in module.parameters()}
        kept = {id(weight) for weight in _embeddings(model)}
        return {
            name: weight for name, weight in model.named_parameters() if id(weight) in wanted - kept
        }

    def adapted(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """Layers that get low-rank changes, by name.

        Raises
        ------
        LayerOutOfRange
            If the decoder has no such block.
        """
        if self.mode != "lora":
            return {}
        anatomy = anatomy_of(model)
        last = len(anatomy.blocks) - 1 if self.last is None else self.last
        anatomy.check_layers([last])
        inside = {id(module) for block in anatomy.blocks[: last + 1] for module in block.modules()}
        return {
            name: module
            for name, module in model.named_modules()
            if id(module) in inside and isinstance(module, nn.Linear)
        }


@dataclass(frozen=True)
class Retrieved:
    """Where a retrieved text stands in a prompt.

    Raises
    ------
    ValueError
        If the place is not one of those named or the wording has not one gap.
    """

    place: Place = "before"
    """``before`` the image, as in the authors' training code: in the system's turn, behind what
    stands there, because many chat templates put pictures before all text of the user; ``after``
    the image and before the question, as in their analysis."""
    wording: str = "Retrieved Text: {}."
    """The authors'."""

    def __post_init__(self) -> None:
        if self.place not in get_args(Place):
            right = ", ".join(get_args(Place))
            raise ValueError(f"place: {self.place!r} is not one of {right}.")
        if self.wording.count("{}") != 1:
            raise ValueError(f"wording: {self.wording!r} has not one gap; write {{}} once.")

    def put(self, request: Request, text: str) -> Request:
        """Put a text into the prompt of a request."""
        said = self.wording.replace("{}", text)
        if self.place == "after":
            return replace(request, text=f"{said} {request.text}")
        return replace(request, system=said if not request.system else f"{request.system} {said}")


class Retriever(Protocol):
    """Finds a text for a picture (see :class:`hauberk.retrieval.Retriever`)."""

    def texts(self, images: Any) -> list[str]:
        """Give one text for each picture."""
        ...


class Projector:
    """Trained weights in place of a model's own.

    Parameters
    ----------
    tensors : by the weight's name, its new value; or, as NAME.lora_A and NAME.lora_B, the factors
        (rank, inputs) and (outputs, rank) of what is added to it
    part : what they are of
    about : what the card says of the training: layers, position and so on
    retrieved, retriever : at inference, a text that is retrieved for the picture is put into the
        prompt; None leaves requests as they are, which is the default
    """

    method = "tga"

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        part: Part,
        about: Mapping[str, Any] | None = None,
        *,
        retrieved: Retrieved | None = None,
        retriever: Retriever | None = None,
    ) -> None:
        self.tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        self.part, self.about = part, dict(about or {})
        self.retrieved, self.retriever = retrieved, retriever
        self._bound: Bound | None = None

    def rewrite(self, request: Request) -> Request:
        """Put the retrieved text of the first picture into the prompt, if that is switched on."""
        return self.rewrite_all([request])[0]

    def rewrite_all(self, requests: Sequence[Request]) -> list[Request]:
        """Change many at once: their pictures are looked at together."""
        if self.retrieved is None:
            return list(requests)
        if self.retriever is None:
            raise UnsupportedRequest(
                "this bundle puts a retrieved text into every prompt, and there is nothing to "
                "retrieve with; give with_retrieved(retrieved, retriever), or (None, None) to "
                "answer without."
            )
        pictured = [index for index, request in enumerate(requests) if request.images]
        texts = self.retriever.texts([requests[index].images[0] for index in pictured])
        changed = list(requests)
        for index, text in zip(pictured, texts, strict=True):
            if text:
                changed[index] = self.retrieved.put(requests[index], text)
        return changed

    def with_retrieved(
        self, retrieved: Retrieved | None, retriever: Retriever | None
    ) -> "Projector":
        """The same weights with retrieved texts in the prompts, or without."""
        other = Projector(
            self.tensors, self.part, self.about, retrieved=retrieved, retriever=retriever
        )
        other._bound = self._bound
        return other

    @torch.no_grad()
    def mixed(self, model: PreTrainedModel, alpha: float) -> "Projector":
        """Weights between a model's own and these: W + alpha (W' - W).

        What a training gains and what it costs grow differently along this line, so that a share of
        the change often keeps most of the gain at a fraction of the cost (Wortsman et al., CVPR
        2022, arXiv:2109.01903).  Of low-rank changes one factor is scaled, which is the same.

        Raises
        ------
        ValueError
            If ``alpha`` is not between 0 and 1.
        UnsupportedRequest
            If weights of this model are replaced already.
        WrongModel
            As :meth:`applied` does.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: {alpha} is wrong, from 0 to 1 is right.")
        self._check(model)
        parameters = dict(model.named_parameters())

        def between(name: str, value: Tensor) -> Tensor:
            if name.endswith(FACTOR_A):
                return value
            if name.endswith(FACTOR_B):
                return alpha * value
            own = parameters.get(name)
            if own is None or own.shape != value.shape:
                raise _unfitting(name, tuple(value.shape), own)
            wide = torch.promote_types(own.dtype, value.dtype)
            return own.detach().to("cpu", wide).lerp(value.to(wide), alpha)

        tensors = {name: between(name, value) for name, value in self.tensors.items()}
        about = self.about | {"share": alpha * self.about.get("share", 1.0)}
        other = Projector(
            tensors, self.part, about, retrieved=self.retrieved, retriever=self.retriever
        )
        other._bound = self._bound
        return other

    @torch.no_grad()
    def weights(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """What the weights of a model become, by name, in its precision and on its device.

        Raises
        ------
        WrongModel
            If it has no such weights, or of another shape.
        """
        parameters = dict(model.named_parameters())
        made = {}
        for name, factors in _by_weight(self.tensors).items():
            weight = parameters.get(name)
            value = factors.get("")
            expected = (
                (factors[FACTOR_B].shape[0], factors[FACTOR_A].shape[1])
                if value is None
                else tuple(value.shape)
            )
            if weight is None or tuple(weight.shape) != expected:
                raise _unfitting(name, expected, weight)
            if value is None:
                a, b = (factors[kind].to(weight.device).float() for kind in (FACTOR_A, FACTOR_B))
                value = weight.float() + (self.part.alpha / self.part.rank) * (b @ a)
            made[name] = value.to(weight)
        return made

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Replace the weights while the ``with`` block runs; put back bit by bit after it.

        Raises
        ------
        UnsupportedRequest
            If weights of this model are replaced already.
        WrongModel
            If it was loaded from a bundle for another model, or the weights do not fit.
        """
        parameters, new = self._fitted(model)
        old = {name: parameters[name].data for name in new}
        _REPLACED.add(model)
        try:
            for name, value in new.items():
                parameters[name].data = value
            yield
        finally:
            for name, value in old.items():
                parameters[name].data = value
            _REPLACED.discard(model)

    def install(self, model: PreTrainedModel) -> None:
        """Replace the weights for good; no other replacement can be applied to the model after it.

        Raises
        ------
        UnsupportedRequest, WrongModel
            As :meth:`applied` does.
        """
        parameters, new = self._fitted(model)
        for name, value in new.items():
            parameters[name].data = value
        _REPLACED.add(model)

    def _fitted(self, model: PreTrainedModel) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        self._check(model)
        return dict(model.named_parameters()), self.weights(model)

    def _check(self, model: PreTrainedModel) -> None:
        if self._bound:
            self._bound.check(model)
        if model in _REPLACED:
            raise UnsupportedRequest(
                f"weights of a {self.method} defense are in this model already; inside the block "
                "call model.generate, or respond without `defense`, or leave the block first; "
                "where they were installed, load the model again."
            )

    def export(self, model: PreTrainedModel, processor: ProcessorMixin, folder: str | Path) -> Path:
        """Write the model with these weights as a checkpoint that stock transformers loads.

        It answers as the model does while this is applied.  The retrieved text, if that is switched
        on, is no part of it.

        Raises
        ------
        UnsupportedRequest, WrongModel
            As :meth:`applied` does.
        """
        folder = Path(folder)
        with self.applied(model), replacing(folder) as partial:
            model.save_pretrained(partial)
            processor.save_pretrained(partial)
        return folder

    def save(self, folder: Path, binding: Binding, **about: Any) -> Path:
        """Write the bundle: the changed tensors as safetensors, everything else in the card."""
        extra = about.pop("extra_files", None)

        def write(home: Path) -> None:
            save_file({n: t.contiguous() for n, t in self.tensors.items()}, home / _TENSORS)

        parameters: dict[str, Any] = {
            "part": asdict(self.part),
            "trained": _modules(self.tensors),
            "retrieved": None if self.retrieved is None else asdict(self.retrieved),
            "training": self.about,
        }
        return write_bundle(folder, Card(self.method, binding, parameters, **about), write, extra)

    @classmethod
    def load(
        cls, home: Path, card: Card, model: PreTrainedModel, processor: ProcessorMixin
    ) -> Self:
        """Read a verified bundle; a retriever, if it is to be used, is given by ``with_retrieved``.

        Raises
        ------
        TamperedBundle, WrongModel
            If there are no such weights in it, or some that do not fit the model.
        """
        try:
            tensors = load_file(home / _TENSORS)
            part = Part(**card.parameters["part"])
            about = dict(card.parameters["training"])
            told = card.parameters["retrieved"]
            retrieved = None if told is None else Retrieved(**told)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TamperedBundle(
                f"{home}: its card and {_TENSORS} are no trained weights ({error}); download the "
                "bundle again."
            ) from None
        expected, found = _expected(part, model), set(tensors)
        if found != expected:
            raise TamperedBundle(
                f"{home / _TENSORS}: mode {part.mode!r} changes {len(expected)} tensors of this "
                f"model; missing are {sorted(expected - found)[:3]}, too many "
                f"{sorted(found - expected)[:3]}; download the bundle again."
            )
        projector = cls(tensors, part, about, retrieved=retrieved)
        projector.weights(model)  # holds every shape against the model's
        projector._bound = Bound(card, model, processor)
        return projector


def _unfitting(name: str, expected: tuple[int, ...], weight: Tensor | None) -> WrongModel:
    shape = "is not there" if weight is None else tuple(weight.shape)
    return WrongModel(
        f"the trained weight {name!r} has shape {expected}, that of this model {shape}; load the "
        "model that it was trained for."
    )


def check_part(part: Part, model: PreTrainedModel) -> None:
    """Raise unless a model has weights that can be replaced.

    Raises
    ------
    UnsupportedRequest
        If it has none, or some that are stored in less than half precision.
    LayerOutOfRange, UnknownFamily
        If the model has no such parts.
    """
    whole = part.whole(model)
    weights = whole | {name: layer.weight for name, layer in part.adapted(model).items()}
    if not whole or (part.mode == "lora" and len(weights) == len(whole)):
        raise UnsupportedRequest(
            f"the parts that mode {part.mode!r} changes have no weights in this "
            f"{model.config.model_type!r} model; choose another mode."
        )
    packed = sorted(name for name, weight in weights.items() if not weight.is_floating_point())
    if packed:
        raise UnsupportedRequest(
            f"{len(packed)} weights, such as {packed[0]!r}, are quantised, and cannot be replaced "
            "by trained ones; load the model in half precision."
        )


def _expected(part: Part, model: PreTrainedModel) -> set[str]:
    check_part(part, model)
    factors = {
        f"{name}.weight{kind}" for name in part.adapted(model) for kind in (FACTOR_A, FACTOR_B)
    }
    return set(part.whole(model)) | factors


def _by_weight(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort tensors by the weight that they are of: by "" the whole, or by kind the factors."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind = next((kind for kind in (FACTOR_A, FACTOR_B) if name.endswith(kind)), "")
        found.setdefault(name.removesuffix(kind), {})[kind] = tensor
    return found


def _modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """Modules that hold changed weights, as a card tells them."""
    return sorted({name.rpartition(".")[0] for name in _by_weight(tensors)})


def _norms(anatomy: Anatomy) -> list[nn.Module]:
    """The decoder's last norm: what it holds beside blocks and embeddings."""
    norm = getattr(anatomy.decoder, "norm", None)
    return [norm] if isinstance(norm, nn.Module) else []


def _embeddings(model: PreTrainedModel) -> list[nn.Parameter]:
    """The table of words and the head, which may be one tensor."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return [weight for table in tables if table is not None for weight in table.parameters()]
