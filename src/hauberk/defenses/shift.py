"""CMRM: give back to the hidden states what the mere presence of an image takes away.

An image, even a blank one, moves the decoder's states away from where the language model learnt
to refuse.  With h[l](x) the state after block l at the last prompt position, x a prompt, and
img' a meaningless image, the shift is estimated for one sample or over a data set (Eq. 4, 5),

    v[l](x) = h[l](x) - h[l](x, img')            v[l] = mean_i v[l](x_i),

and added where the model decodes (Eq. 6): h[l] <- h[l] + alpha v[l].  The paper prints both
signs; we always move towards text, as its model of the shift (Eq. 3) demands.

v[l] is the gap *accumulated* up to block l.  Adding it at every block (``compose: naive``, the
literal reading) adds it again to a stream that already carries the additions below, so the
realised displacement grows with depth.  ``incremental`` adds v[l] - v[l-1] instead, which sums
to v[l] at every depth; ``single`` adds v[l] at one block only.

Source: Liu et al., "Unraveling and Mitigating Safety Alignment Degradation of Vision-Language
Models", Findings of ACL 2025, arXiv:2410.09047.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self
from weakref import WeakSet

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.analysis.twins import TwinStates, check_read_off, rendered_shifts
from hauberk.anatomy import Anatomy, anatomy_of
from hauberk.blank import BlankKind
from hauberk.bundle import Binding, Bound, Card, write_bundle
from hauberk.errors import TamperedBundle, UnsupportedRequest, WrongModel
from hauberk.hooks import Edit, editing
from hauberk.passes import Passes
from hauberk.requests import Request, encode

Level = Literal["dataset", "sample"]
Compose = Literal["naive", "incremental", "single"]
Estimator = Literal["mean", "rank1"]
Position = Literal["last", "all"]
Steps = Literal["all", "prefill"]

_TENSORS = "shift.safetensors"
_SHIFTED: WeakSet[PreTrainedModel] = WeakSet()
"""Models inside a ``with`` block of :meth:`Shift.applied`: a second shift would add to the first
without a word.  A defense of another method may act on the same model."""


@dataclass(frozen=True)
class ShiftSetting:
    """What a run may vary.  The defaults are the literal reading of the paper.

    Raises
    ------
    ValueError
        If a layer is named twice.
    """

    level: Level = "dataset"
    """One vector for all requests, or one for each (two short extra prefills)."""
    compose: Compose = "naive"
    estimator: Estimator = "mean"
    """Of the dataset level: the mean, or the uncentred first principal direction.  (Ordinary PCA
    centres the differences and so finds the variation around the shift, not the shift.)"""
    position: Position = "last"
    """Edit the position that is being decoded, or every position of the prompt as well."""
    steps: Steps = "all"
    """Edit at every decoding step, or only while the prompt is read."""
    layers: tuple[int, ...] | None = None
    """Decoder blocks to correct, counted from 0; None for all.  ``single`` takes one."""
    alpha: float = 1.0
    """0 leaves the model as it is; 1 gives the whole shift back (the paper sweeps 0 to 1)."""
    blank: BlankKind = "white"

    def __post_init__(self) -> None:
        layers = self.layers or ()
        repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
        if repeated:  # between a layer and itself `incremental` would find nothing to add
            raise ValueError(f"layers: {repeated} stand there more than once; once is right.")

    def chosen_layers(self, blocks: int) -> tuple[int, ...]:
        """Name the blocks to correct in a model of ``blocks`` blocks."""
        return tuple(range(blocks)) if self.layers is None else tuple(sorted(self.layers))


def estimate_shift(shifts: Tensor, estimator: Estimator = "mean") -> Tensor:
    """Reduce the shifts of single samples to one vector a layer (Eq. 5).

    Parameters
    ----------
    shifts : (n, layers, hidden size), any float dtype
    estimator : ``mean``, or ``rank1``: the leading right singular vector of the uncentred
        differences, signed and scaled by its inner product with the mean, so that alpha keeps
        its meaning as a share of the shift

    Returns
    -------
    Tensor (layers, hidden size), float32

    Raises
    ------
    ValueError
        If there is no sample, or the estimator is unknown.
    """
    if shifts.ndim != 3 or not len(shifts):
        raise ValueError(f"shifts must be (n, layers, hidden size), n > 0; got {shifts.shape}.")
    shifts = shifts.float()
    mean: Tensor = shifts.mean(0)
    if estimator == "mean":
        return mean
    if estimator == "rank1":
        by_layer = shifts.transpose(0, 1)
        direction: Tensor = torch.linalg.svd(by_layer, full_matrices=False).Vh[:, 0]
        return direction * (direction * mean).sum(-1, keepdim=True)
    raise ValueError(f"estimator {estimator!r} is not one of mean, rank1.")


def sample_shifts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    *,
    blank: BlankKind = "white",
    batch_size: int = 64,
) -> Tensor:
    """Compute the shift of every request: (requests, layers, hidden size) float32 on the CPU.

    Only the presence and the size of an image matter, not what it shows.  Where the twins can be
    read off the tokens they share their blank prefix (:class:`TwinStates`); elsewhere both are read
    whole, to the same numbers.

    Raises
    ------
    UnsupportedRequest
        If a request has no image: its shift would be zeros, which shrink every mean.
    """
    without = [request.text for request in requests if not request.images]
    if without:
        raise UnsupportedRequest(
            f"{len(without)} of {len(requests)} requests have no image (such as "
            f"{without[0][:60]!r}), so that there is no shift to compute; give anchors with "
            "a picture."
        )
    try:
        twins = TwinStates(model, processor, blank)
    except UnsupportedRequest:
        return rendered_shifts(model, processor, requests, blank, batch_size)
    found = []
    for start in range(0, len(requests), batch_size):
        inputs = encode(processor, requests[start : start + batch_size]).to(model.device)
        found.append(
            twins.shifts(
                inputs["input_ids"],
                inputs["attention_mask"],
                image_grid_thw=inputs.get("image_grid_thw"),
            ).cpu()
        )
    return torch.cat(found)


def check_applies(anatomy: Anatomy, setting: ShiftSetting, images: Any) -> None:
    """Raise unless a shift can be applied to a model; ``images`` is its image processor.

    Raises
    ------
    LayerOutOfRange
        If the model has no such blocks.
    UnsupportedRequest
        At sample level, if the twins of a prompt do not follow from its tokens.
    """
    anatomy.check_layers(setting.chosen_layers(len(anatomy.blocks)))
    if setting.level == "sample":
        check_read_off(anatomy, images)


def composed(vectors: Tensor, setting: ShiftSetting) -> dict[int, Tensor]:
    """Tell what is added at each layer: layer -> alpha times (..., hidden size).

    Parameters
    ----------
    vectors : (..., layers, hidden size) of accumulated shifts
    """
    layers = setting.chosen_layers(vectors.shape[-2])
    added, below = {}, None
    for layer in layers:
        vector = vectors[..., layer, :]
        step = vector - below if setting.compose == "incremental" and below is not None else vector
        added[layer] = setting.alpha * step
        below = vector
    return added


class Shift:
    """A fitted CMRM defense.

    Parameters
    ----------
    vectors : (layers, hidden size) float32
        The dataset-level shift.  At sample level it is not added; it is kept as the yardstick
        of the realised displacement.
    setting : what to do with it
    processor : needed at sample level, where the twins of a prompt are tokenized anew
    twins : at sample level, what computes the shifts of its own model; another model, or None,
        gets a new one in each block of :meth:`applied`
    """

    method = "cmrm"

    def __init__(
        self,
        vectors: Tensor,
        setting: ShiftSetting,
        processor: ProcessorMixin | None = None,
        twins: TwinStates | None = None,
    ) -> None:
        if setting.level == "sample" and processor is None:
            raise ValueError("level 'sample' needs the processor to make the twins of a prompt.")
        if setting.compose == "single" and len(setting.layers or ()) != 1:
            raise ValueError(
                f"compose 'single' takes exactly one layer, got {setting.layers}; "
                "give `layers` one number."
            )
        if twins is not None and twins.blank != setting.blank:
            raise ValueError(f"blank {setting.blank!r} of the setting is {twins.blank!r} of twins.")
        if twins is not None and twins.processor is not processor:
            raise ValueError("the twins are of another processor; give both the same.")
        self.vectors, self.setting, self.processor = vectors.float().cpu(), setting, processor
        self.twins = twins
        self._bound: Bound | None = None

    def rewrite(self, request: Request) -> Request:
        """Return the request as it is: CMRM acts inside the model."""
        return request

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Correct the states of requests with an image while the ``with`` block runs.

        Text-only rows keep every bit, and so does everything at alpha 0.  Keep the block open
        over many requests: at sample level the cache of the blank image lives as long as it.

        Raises
        ------
        UnsupportedRequest
            If a shift is applied to this model already.
        WrongModel
            If it was loaded from a bundle for another model.
        LayerOutOfRange, UnknownFamily
            If the model has no such blocks.
        """
        if self._bound:
            self._bound.check(model)
        anatomy = anatomy_of(model)
        check_applies(anatomy, self.setting, getattr(self.processor, "image_processor", None))
        if model in _SHIFTED:
            raise UnsupportedRequest(
                f"a {self.method} defense is applied to this model already, and a second one would "
                "add its shift to the first; inside the block call model.generate, or respond "
                "without `defense`, or leave the block first."
            )
        _SHIFTED.add(model)
        try:
            with self._edited(model, anatomy):
                yield
        finally:
            _SHIFTED.discard(model)

    @contextmanager
    def _edited(self, model: PreTrainedModel, anatomy: Anatomy) -> Iterator[None]:
        if self.setting.alpha == 0:
            yield
            return
        layers = self.setting.chosen_layers(len(anatomy.blocks))
        session = _Session(self, model, anatomy)
        edits: dict[int, Edit] = {layer: partial(session.edit, layer) for layer in layers}
        before = model.register_forward_pre_hook(session.before, with_kwargs=True)
        after = model.register_forward_hook(session.after)
        with editing(anatomy.blocks, edits), before, after:
            yield

    def with_alpha(self, alpha: float) -> "Shift":
        """The same defense at another strength."""
        setting = replace(self.setting, alpha=alpha)
        other = Shift(self.vectors, setting, self.processor, self.twins)
        other._bound = self._bound
        return other

    def save(self, folder: Path, binding: Binding, **about: Any) -> Path:
        """Write the bundle: vectors as float32 safetensors, everything else in the card."""
        extra = about.pop("extra_files", None)

        def write(home: Path) -> None:
            save_file({"shift": self.vectors.contiguous()}, home / _TENSORS)

        card = Card(self.method, binding, parameters=asdict(self.setting), **about)
        return write_bundle(folder, card, write, extra)

    @classmethod
    def load(
        cls, home: Path, card: Card, model: PreTrainedModel, processor: ProcessorMixin
    ) -> Self:
        """Read a verified bundle.

        Raises
        ------
        TamperedBundle, WrongModel
            If there are no shift vectors in it, or some of another shape.
        """
        try:
            tensors = load_file(home / _TENSORS)
        except (OSError, SafetensorError) as error:
            raise TamperedBundle(
                f"{home / _TENSORS}: expected shift vectors, found none ({error}); download the "
                "bundle again."
            ) from None
        anatomy = anatomy_of(model)
        expected = (len(anatomy.blocks), anatomy.hidden_size)
        if set(tensors) != {"shift"}:
            raise TamperedBundle(f"{home}: expected the tensor 'shift', found {sorted(tensors)}.")
        if tuple(tensors["shift"].shape) != expected:
            raise WrongModel(
                f"{home}: shift vectors for this model have shape {expected}, "
                f"found {tuple(tensors['shift'].shape)}."
            )
        parameters = dict(card.parameters)
        if parameters["layers"] is not None:
            parameters["layers"] = tuple(parameters["layers"])
        shift = cls(tensors["shift"], ShiftSetting(**parameters), processor)
        shift._bound = Bound(card, model, processor)
        return shift


class _Session:
    """What has to be remembered between the prompt and its decoding steps, for one model."""

    def __init__(self, shift: Shift, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self.setting, self.anatomy = shift.setting, anatomy
        self.fixed = {
            layer: vector.to(model.device)
            for layer, vector in composed(shift.vectors, shift.setting).items()
        }
        self.twins: TwinStates | None = None
        if shift.setting.level == "sample":
            assert shift.processor is not None  # checked by Shift
            kept = shift.twins if shift.twins and shift.twins.model is model else None
            self.twins = kept or TwinStates(model, shift.processor, shift.setting.blank)
        self.video: int | None = getattr(model.config, "video_token_id", None)
        self.rows: Tensor | None = None
        """Rows of the prompt with an image; None while nothing is to be edited."""
        self.where = torch.empty(0, 0, dtype=torch.bool)
        """Positions to edit in this pass, bool (rows, positions)."""
        self.spots = (torch.empty(0, dtype=torch.long),) * 3
        """The same as indices, of rows and positions in this pass and of rows of the prompt: found
        once a pass, not once a block."""
        self.added = self.fixed
        self.passes = Passes("CMRM")

    def before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Look at the inputs of one forward pass and decide what its edits are."""
        if self.passes.before(args, kwargs):
            self._read_prompt(self.passes.prompt, kwargs)
        else:
            self._decode()

    def after(self, module: Any, args: Any, output: Any) -> None:
        """Remember the cache that the model made for the prompt where the caller gave none."""
        self.passes.after(output)

    def edit(self, layer: int, states: Tensor) -> Tensor:
        """Add the shift at one block: (rows, positions, hidden size) -> the same."""
        row, position, own = (spot.to(states.device) for spot in self.spots)
        if self.rows is None or not len(row):
            return states
        added = self.added[layer].to(states.device)
        # In float32 before it meets half precision states, so that small steps are not lost.
        moved = states[row, position].float() + (added[own] if added.ndim > 1 else added)
        return states.index_put((row, position), moved.to(states.dtype))

    def _aim(self, where: Tensor) -> None:
        """Set the positions to edit in this pass."""
        if where.shape != self.where.shape or not torch.equal(where, self.where):
            rows, positions = where.nonzero(as_tuple=True)
            self.where, self.spots = where, (rows, positions, self.passes.left[rows])

    def _read_prompt(self, ids: Tensor, kwargs: dict[str, Any]) -> None:
        self.rows = None  # the twins run through the same blocks, unedited
        if self.video is not None and (ids == self.video).any():
            raise UnsupportedRequest(
                "CMRM undoes what a picture does, and this prompt holds a video; give single "
                "frames of it as pictures, or answer it undefended."
            )
        pictured = (ids == self.anatomy.image_token_id).any(1)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):  # by kind of attention; None where nothing is hidden
            mask = next((kind for kind in mask.values() if kind is not None), None)
        mask = torch.ones_like(ids) if mask is None else mask
        self.where = ids[:0].bool()
        if not pictured.any():
            return
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise UnsupportedRequest(
                f"an attention mask of {found}, where one of (rows, positions) would tell which "
                "positions are padding; use the dynamic cache, which is generate's default (leave "
                "out cache_implementation), and give the mask that the processor made."
            )
        if self.twins is not None:
            shifts = self.twins.shifts(
                ids,
                mask,
                image_grid_thw=kwargs.get("image_grid_thw"),
                position_ids=kwargs.get("position_ids"),
            )
            self.added = composed(shifts, self.setting)
        positions = torch.arange(ids.shape[1], device=ids.device)
        attended = mask.bool()
        last = (attended * positions).amax(1, keepdim=True)
        chosen = attended if self.setting.position == "all" else positions == last
        self._aim(chosen & pictured.unsqueeze(1))
        self.rows = pictured

    def _decode(self) -> None:
        if self.rows is None:
            return
        new = self.rows[self.passes.left].unsqueeze(1)
        if self.setting.steps == "prefill":
            new = torch.zeros_like(new)
        if self.passes.past:
            self._aim(new)
        else:
            self._aim(torch.cat([self.where, new], dim=1))
