"""Defenses that a served model cannot have, each by its method with what it changes.

A module of its own, so that parameters can be checked without torch; see :mod:`hauberk.target`.
"""

CHANGES = {
    "cmrm": "it moves the hidden states of the decoder; run the model here, or take a frame or "
    "mask.",
    "tga": "it replaces weights of the projector; serve the model that `export` writes instead.",
}
