"""What can go wrong, as a user sees it.

* HauberkError            catch this to catch them all
  x BadParams             params.yaml holds something that no run can use
  x BadData               a data file is not what it claims to be
  x BadModel              nothing tells what model this is, or it cannot be built
  x UnknownFamily         no anatomy is known for this model
  x LayerOutOfRange       a setting names a block that the model does not have
  x ResampledPicture      a picture has a size that no gradient passes through
  x BadRequest            a request that the model or its processor cannot read
  x UnsupportedRequest    a defense cannot act on this way of calling the model
  x Diverged              a training went to where numbers end
  x BadBundle             a folder is no bundle, or one of a newer hauberk
  x TamperedBundle        a bundle's bytes are not those that were published
  x WrongModel            a bundle was made for another model
  x MissingClip           the CLIP that a bundle looks at pictures with cannot be loaded
  x BadEndpoint           a served model refuses whatever it is asked, or lacks its key
  x BadJudge              a judge is described wrongly, or its model cannot be loaded
  x CannotLoad            a model cannot be loaded from where it is said to be
  x ShardsFailed          processes of an evaluation failed; what they finished is kept
"""


class HauberkError(Exception):
    """Anything that a user of hauberk can cure."""


def reason_of(error: BaseException) -> str:
    """What the error of another library says, in one line: its first, or else its name."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class BadParams(HauberkError):
    """A parameter is unknown, of the wrong type, or out of range."""


class BadData(HauberkError):
    """A data file is missing, malformed, or holds rows that contradict each other."""


class BadModel(HauberkError):
    """The config of a model cannot be read, or tells of none that can be built."""


class UnknownFamily(HauberkError):
    """The parts of a model could not be found."""


class LayerOutOfRange(HauberkError, ValueError):
    """A decoder block was asked for that the model does not have."""


class ResampledPicture(HauberkError, ValueError):
    """The image processor would resample or crop a picture, outside of differentiation."""


class BadRequest(HauberkError, ValueError):
    """A request holds what the model or its processor cannot read."""


class UnsupportedRequest(HauberkError):
    """The model is called in a way that the defense cannot follow."""


class Diverged(HauberkError, ArithmeticError):
    """A loss or gradient is infinite or not a number."""


class BadBundle(HauberkError):
    """The folder does not hold a bundle that this version can read."""


class TamperedBundle(HauberkError):
    """A file of a bundle is missing, unlisted, or differs from its recorded hash."""


class WrongModel(HauberkError):
    """A bundle is bound to other weights, another architecture, config, template or processor."""


class MissingClip(HauberkError):
    """The CLIP that a bundle needs beside its model is not where the card says."""


class BadEndpoint(HauberkError):
    """A served model answers nothing until its address, name, key or account is corrected."""


class BadJudge(HauberkError):
    """There is no such judge, or its model is not what its format is made for."""


class CannotLoad(HauberkError):
    """A model is missing, gated, incomplete or damaged, or what it needs is not installed."""


class ShardsFailed(HauberkError):
    """Processes of an evaluation failed; their answers so far are kept."""
