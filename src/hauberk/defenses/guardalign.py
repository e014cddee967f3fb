"""GuardAlign: mask what a CLIP finds unsafe in a picture, and keep a safety prefix attended to.

Two parts that know nothing of each other.  :mod:`hauberk.defenses.patch_transport` paints over the
patches of a picture whose score is unsafe; :mod:`hauberk.defenses.prefix_attention` puts a prefix
before the query and lets the middle blocks look at it harder.  Each may be left out, which the
paper does not measure: it has neither a row of transport alone nor one of the prefix alone.

A bundle holds the features of the concepts, so that it depends on no other artifact, the hash of
the bank that they come from, the settings of both parts with their threshold, and the binding of
the CLIP.  The CLIP itself is loaded from where that binding says, as the model's weights are.

Source: "GuardAlign", ICLR 2026, arXiv:2602.24027; its code is not public.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

from hauberk.bundle import Binding, Bound, Card, binding_of, check_binding, write_bundle
from hauberk.concepts import METHOD as CONCEPT_BANK
from hauberk.concepts import ConceptBank
from hauberk.defenses.patch_transport import PatchTransport, plain, setting_from
from hauberk.defenses.prefix_attention import PrefixAttention, PrefixSetting
from hauberk.defenses.unseen import Unseen
from hauberk.errors import MissingClip, TamperedBundle, reason_of
from hauberk.requests import Request


class GuardAlign:
    """Masking and prefix together, or one of them.

    Parameters
    ----------
    transport : masks pictures; None for no masking
    prefix : None for no prefix
    bank_hash : ``card_sha256`` of the concept bank's bundle, which the bundle of this will name

    Raises
    ------
    ValueError
        If there is neither.
    """

    method = "guardalign"

    def __init__(
        self,
        transport: PatchTransport | None,
        prefix: PrefixAttention | None,
        *,
        bank_hash: str = "",
    ) -> None:
        if transport is None and prefix is None:
            raise ValueError("neither transport nor prefix: nothing would be done; give one.")
        self.transport, self.prefix, self.bank_hash = transport, prefix, bank_hash
        self._bound: Bound | None = None
        self._unseen = Unseen("GuardAlign")

    def rewrite(self, request: Request) -> Request:
        """Mask the pictures of a request, then put the prefix into it.

        Where the gate of the transport's setting is ``any_masked``, a request of which nothing was
        masked is returned as the object that it is.

        Raises
        ------
        BadRequest
            If a picture cannot be read.
        """
        return self.rewrite_all([request])[0]

    def rewrite_all(self, requests: Sequence[Request]) -> list[Request]:
        """Change many at once: the patches of all pictures are encoded in common batches."""
        self._unseen.shown = self._unseen.shown or any(request.images for request in requests)
        masked = list(requests) if self.transport is None else self.transport.rewrite_all(requests)
        if self.prefix is None:
            return masked
        return [
            self.prefix.rewrite(after)
            if self.transport is None or self.transport.opens_gate(before, after)
            else after
            for before, after in zip(requests, masked, strict=True)
        ]

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Calibrate the attention on the prefix, if there is one, while the ``with`` block runs.

        Raises
        ------
        WrongModel
            If it was loaded from a bundle for another model.
        UnsupportedRequest, LayerOutOfRange, UnknownFamily
            As :meth:`PrefixAttention.applied` does; and when the model is given a picture, and this
            defense never was.
        """
        if self._bound:
            self._bound.check(model)
        calibrated = self.prefix.applied(model) if self.prefix else nullcontext()
        masks = self._unseen.refused(model) if self.transport else nullcontext()
        with masks, calibrated:
            yield

    def with_prefix(self, prefix: PrefixAttention | None) -> "GuardAlign":
        """The same transport with another prefix, or none."""
        return self._like(self.transport, prefix)

    def with_transport(self, transport: PatchTransport | None) -> "GuardAlign":
        """The same prefix with another transport, or none."""
        return self._like(transport, self.prefix)

    def _like(
        self, transport: PatchTransport | None, prefix: PrefixAttention | None
    ) -> "GuardAlign":
        other = GuardAlign(transport, prefix, bank_hash=self.bank_hash)
        other._bound = self._bound
        return other

    def save(self, folder: Path, binding: Binding, **about: Any) -> Path:
        """Write the bundle: features as float32 safetensors, everything else in the card."""
        extra = about.pop("extra_files", None)
        transport, prefix = self.transport, self.prefix
        parameters: dict[str, Any] = {
            "transport": None if transport is None else plain(transport.setting),
            "prefix": None if prefix is None else asdict(prefix.setting),
        }
        if transport is not None:
            parameters |= {
                "concepts": transport.bank.parameters,
                "concept_bank": self.bank_hash,
                "clip": asdict(binding_of(transport.clip, transport.processor)),
            }

        def write(home: Path) -> None:
            if transport is not None:
                transport.bank.write(home)

        return write_bundle(folder, Card(self.method, binding, parameters, **about), write, extra)

    @classmethod
    def load(
        cls,
        home: Path,
        card: Card,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        clip: Path | str | None = None,
    ) -> Self:
        """Read a verified bundle, and the CLIP that it looks at pictures with.

        ``clip`` is where it lies, in place of where the card says.

        Raises
        ------
        MissingClip, TamperedBundle, WrongModel
            As :meth:`read` does.
        """
        guard = cls.read(home, card, clip=clip, processor=processor)
        if guard.transport is not None:
            guard.transport.clip.to(model.device)  # type: ignore[arg-type]
        guard._bound = Bound(card, model, processor)
        return guard

    @classmethod
    def read(
        cls,
        home: Path,
        card: Card,
        *,
        clip: Path | str | None = None,
        processor: ProcessorMixin | None = None,
    ) -> Self:
        """Read a verified bundle for whatever model: masks and words work on requests alone.

        Without a ``processor`` no attention can be calibrated: there this is for a model that is
        served elsewhere, and its prefix for gamma 0.

        Raises
        ------
        MissingClip
            If the CLIP cannot be loaded from where the card, or ``clip``, says.
        TamperedBundle, WrongModel
            If the features or settings are none, or the CLIP is another.
        """
        told = card.parameters
        try:
            masking, saying = told["transport"], told["prefix"]
            if masking is None and saying is None:
                raise ValueError("neither transport nor prefix")
            prefix = None if saying is None else _prefix(saying)
            transport = None
            if masking is not None:
                transport = setting_from(masking), told["concepts"], Binding(**told["clip"])
                if transport[0].score == "log_odds" and not told["concepts"]["reference"]:
                    raise ValueError("score 'log_odds' without reference concepts")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TamperedBundle(
                f"{home}: its card holds no settings of {cls.method} ({error!r}); build it again."
            ) from None
        masks = None
        if transport:
            setting, concepts, made_with = transport
            bank = ConceptBank.read(home, concepts)
            encoder, images = load_clip(made_with, clip)
            check_binding(replace(card, method=CONCEPT_BANK, binding=made_with), encoder, images)
            config: Any = encoder.config
            width = getattr(config, "projection_dim", None) or config.text_config.projection_size
            if bank.features.shape[-1] != width:
                raise TamperedBundle(
                    f"{home}: its concepts have {bank.features.shape[-1]} numbers each, the CLIP "
                    f"makes {width}; build it again."
                )
            masks = PatchTransport(encoder, images, bank, setting)
        return cls(
            masks,
            PrefixAttention(prefix, processor) if prefix else None,
            bank_hash=told.get("concept_bank", ""),
        )


_COMMIT = re.compile(r"[0-9a-f]{40}")


def load_clip(
    binding: Binding, where: Path | str | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load the CLIP that a card names, in float32: its threshold was calibrated in it.

    It is a folder or lies in the cache of the hub; fetched is only what a commit pins.

    Raises
    ------
    MissingClip
        If it cannot be loaded.
    """
    source = str(where or binding.model)
    revision = None if where else binding.revision
    here = {"revision": revision, "local_files_only": not _COMMIT.fullmatch(revision or "")}
    try:
        model = AutoModel.from_pretrained(source, dtype=torch.float32, **here)
        processor = AutoProcessor.from_pretrained(source, **here)
    except Exception as error:
        # transformers has no error of its own for files that are missing, broken or unknown
        why = reason_of(error)
        raise MissingClip(
            f"the CLIP {source!r} (revision {revision or 'any'}) cannot be loaded ({why}); put it "
            "there, or say where it lies: hauberk.load(folder, model, processor, clip=...)."
        ) from None
    return model.eval(), processor


def _prefix(told: Mapping[str, Any]) -> PrefixSetting:
    layers = told["layers"]
    return PrefixSetting(**{**told, "layers": None if layers is None else tuple(layers)})
